------------------------------ MODULE Windows ------------------------------
(* What a sliding window asks of a tree of pages and of its allocator, as    *)
(* functions of the state: SWARadixCache and SWAKvSystem make their actions  *)
(* of them.  Clause ids refer to spec/swa_allocator.md and, the SWARADIX, to *)
(* spec/swa_radix_cache.md.                                                  *)
(*                                                                           *)
(* The pools are a record: free and held pages of the full pool, the same of *)
(* the window pool, and the pair of every full page that has one.  A tree is *)
(* a map from paths to full pages; dead are the paths of its tombstones.     *)
EXTENDS Trie

CONSTANTS Window,       \* k: the pages of a window
          Bug           \* what the model does wrong: "none", or what a configuration wants found

ASSUME Bug \in {"none",
                "stale pair",               \* a full page that is given back keeps its pair
                "takes the full page",      \* a revived page is the caller's, the tree's goes back
                "ignores window locks",     \* eviction takes any pair
                "unlocks by state",         \* a window lock is sought again when it is released
                "asks for the last page",   \* a lock, instead of the window
                "keeps what is read"}       \* a request, what the next page needs, not a window

-----------------------------------------------------------------------------
EmptyPools(pageCount, windowCount) ==
    [free |-> 1..pageCount, held |-> {},
     windowFree |-> 1..windowCount, windowHeld |-> {},
     pair |-> <<>>]

\* SWA-4: both pools have n pages.
CanTake(pools, n) == n <= Cardinality(pools.free) /\ n <= Cardinality(pools.windowFree)

\* SWA-3: the full pages that come next.
NextPages(pools, n) == Smallest(pools.free, n)

\* SWA-3: the next n full pages, each paired with the next window page.
Taken(pools, n) ==
    LET full   == NextPages(pools, n)
        window == Smallest(pools.windowFree, n)
    IN  [free |-> pools.free \ Range(full), held |-> pools.held \cup Range(full),
         windowFree |-> pools.windowFree \ Range(window),
         windowHeld |-> pools.windowHeld \cup Range(window),
         pair |-> [f \in DOMAIN pools.pair \cup Range(full) |->
                     IF f \in Range(full) THEN window[CHOOSE i \in 1..n : full[i] = f]
                     ELSE pools.pair[f]]]

\* SWA-8, SWA-10: the full pages of S with the pairs they have, and the pairs alone of those of T.
Given(pools, S, T) ==
    LET ended == { pools.pair[f] : f \in (S \cup T) \cap DOMAIN pools.pair }
    IN  [free |-> pools.free \cup S, held |-> pools.held \ S,
         windowFree |-> pools.windowFree \cup ended, windowHeld |-> pools.windowHeld \ ended,
         pair |-> Without(pools.pair, IF Bug = "stale pair" THEN T ELSE S \cup T)]

\* SWA-12: each page in the domain of `source` has the pair of its source, which has none then.
Moved(pools, source) ==
    [pools EXCEPT !.pair = [f \in (DOMAIN @ \cup DOMAIN source) \ Range(source) |->
                              IF f \in DOMAIN source THEN @[source[f]] ELSE @[f]]]

\* SWA-1: in either pool a page is free or held.
EachPageOnce(pools, pageCount, windowCount) ==
    /\ pools.free \cup pools.held = 1..pageCount
    /\ pools.free \cap pools.held = {}
    /\ pools.windowFree \cup pools.windowHeld = 1..windowCount
    /\ pools.windowFree \cap pools.windowHeld = {}

\* SWA-2: the pairs lead from held full pages, one to one, to the held window pages.
PairsAreHeld(pools) ==
    /\ DOMAIN pools.pair \subseteq pools.held
    /\ Range(pools.pair) = pools.windowHeld
    /\ \A f, g \in DOMAIN pools.pair : pools.pair[f] = pools.pair[g] => f = g

-----------------------------------------------------------------------------
\* The paths of the last pages of p that a window lock is on; all of them if they are fewer.
WindowOf(p) ==
    { SubSeq(p, 1, n) : n \in (IF Len(p) > Window THEN Len(p) - Window + 1 ELSE 1)..Len(p) }

\* SWARADIX-1: what a match may give: its window is live, or there is no tombstone at all.
Usable(tree, dead, p) ==
    /\ Prefixes(p) \subseteq DOMAIN tree
    /\ \/ Len(p) >= Window /\ WindowOf(p) \cap dead = {}
       \/ Prefixes(p) \cap dead = {}

\* SWARADIX-11: what a handle, of whatever age, can be locked by.
Lockable(tree, dead, p) ==
    IF Bug = "asks for the last page" THEN p = <<>> \/ p \in DOMAIN tree \ dead
    ELSE Usable(tree, dead, p)

\* SWARADIX-1: how it is found.  After n pages the last `run` are live, no fewer than a window if no
\* tombstone has come; `best` is the longest usable prefix that ended before a tombstone.
RECURSIVE Walk(_, _, _, _, _, _)
Walk(tree, dead, key, n, run, best) ==
    LET here == IF run >= Window THEN n ELSE best
        next == SubSeq(key, 1, n + 1)
    IN  IF n = Len(key) \/ next \notin DOMAIN tree THEN here
        ELSE IF next \in dead THEN Walk(tree, dead, key, n + 1, 0, here)
        ELSE Walk(tree, dead, key, n + 1, run + 1, best)

MatchLength(tree, dead, key) == Walk(tree, dead, key, 0, Window, 0)
Matched(tree, dead, key) == SubSeq(key, 1, MatchLength(tree, dead, key))

-----------------------------------------------------------------------------
\* SWARADIX-3: the caller brings the pages of `value`.  Its reach ends with the last page of the key
\* that is live in the tree or that it brings with a pair.
ReachLength(tree, dead, pools, key, value) ==
    Largest({0} \cup { n \in 1..Len(key) :
        \/ SubSeq(key, 1, n) \in DOMAIN tree \ dead
        \/ value[n] \in DOMAIN pools.pair })

\* SWARADIX-5: tombstones of the reach for which the caller has another page, with a pair.
Revived(tree, dead, pools, key, value) ==
    { p \in dead \cap Prefixes(key) :
        tree[p] # value[Len(p)] /\ value[Len(p)] \in DOMAIN pools.pair }

\* SWARADIX-3, SWARADIX-4, SWARADIX-5: tree, tombstones and pools after an insert, which frees
\* nothing.  The bug: the tree gives its own full page back and takes the caller's.
Inserted(tree, dead, pools, key, value) ==
    LET reach   == SubSeq(key, 1, ReachLength(tree, dead, pools, key, value))
        revived == Revived(tree, dead, pools, key, value)
        new     == Prefixes(reach) \ DOMAIN tree
        bare    == { p \in new : value[Len(p)] \notin DOMAIN pools.pair }
        grown   == With(tree, new, LAMBDA p : value[Len(p)])
        before  == { tree[p] : p \in revived }
        source  == [f \in before |-> value[Len(CHOOSE p \in revived : tree[p] = f)]]
        takes   == Bug = "takes the full page"
    IN  [reach |-> reach,
         tree  |-> [p \in DOMAIN grown |->
                      IF takes /\ p \in revived THEN value[Len(p)] ELSE grown[p]],
         dead  |-> (dead \ revived) \cup bare,
         pools |-> IF takes THEN Given(pools, before, {}) ELSE Moved(pools, source)]

\* CACHE-8: pages of a value that the tree did not take.
NotTaken(tree, value) == Range(value) \ Range(tree)

-----------------------------------------------------------------------------
\* SWARADIX-12: the paths of S without the tombstones that no live page extends.
Trimmed(S, dead) == { p \in S : \E q \in S \ dead : p \in Prefixes(q) }

\* SWARADIX-13: what becomes of a live page that is taken from the window pool.
Shrunk(S, dead, p) ==
    LET rest == Trimmed(S \ {p}, dead)
    IN  IF p \in Leaves(S) THEN [paths |-> rest, dead |-> dead \cap rest]
        ELSE [paths |-> S, dead |-> dead \cup {p}]

\* SWARADIX-16: what an eviction gives back, which leaves these paths and tombstones, in one free.
GivenByEviction(tree, dead, pools, after) ==
    Given(pools, { tree[p] : p \in DOMAIN tree \ after.paths },
                 { tree[p] : p \in after.dead \ dead })

\* SWARADIX-7
LeavesAreLive(tree, dead) == Leaves(DOMAIN tree) \cap dead = {}

\* SWARADIX-8
LiveArePaired(tree, dead, pools) ==
    /\ dead \subseteq DOMAIN tree
    /\ \A p \in DOMAIN tree : p \in dead <=> tree[p] \notin DOMAIN pools.pair
=============================================================================
