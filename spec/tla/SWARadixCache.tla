--------------------------- MODULE SWARadixCache ---------------------------
(* The radix cache of models with a sliding window, and the two pools of its *)
(* allocator.  Clause ids refer to spec/swa_radix_cache.md and, the SWA, to  *)
(* spec/swa_allocator.md.  A path has one symbol for each page.  The law:    *)
(*                                                                           *)
(*     full page:    free, or of one path                                    *)
(*     window page:  free, or the pair of one full page                      *)
(*                                                                           *)
(* The client computes the pages of a key, lets go of the window pages that  *)
(* it likes, and inserts; between its calls it holds nothing.  It can have a *)
(* handle of any resident path, from a match or an insert some time ago.     *)
EXTENDS Windows

CONSTANTS PageCount,    \* the full pages are 1 .. PageCount
          WindowCount,  \* the window pages are 1 .. WindowCount
          Texts,        \* set of Seq(symbols): a key is a prefix of one of them
          MaxReceipts   \* how many receipts can be open at once

VARIABLES pools,        \* the allocator, as in Windows
          tree,         \* [resident paths -> full pages]
          dead,         \* SUBSET paths: the tombstones
          last,         \* [resident paths -> rank of the last access, 0 the oldest]
          locks,        \* [resident paths -> how often they are locked]
          windowLocks,  \* [resident paths -> how many window locks cover them]
          receipts,     \* Seq(paths): the open receipts, oldest first
          did           \* the last call, with its arguments; no step reads it

state == <<pools, tree, dead, last, locks, windowLocks, receipts>>
vars  == <<state, did>>

Keys  == UNION { Prefixes(text) : text \in Texts }
Root  == <<>>
Paths == Keys \cup {Root}

TypeOK ==
    /\ DOMAIN tree \subseteq Keys /\ dead \subseteq DOMAIN tree
    /\ DOMAIN last = DOMAIN tree
    /\ DOMAIN locks = DOMAIN tree /\ DOMAIN windowLocks = DOMAIN tree
    /\ receipts \in Seq(Paths) /\ Len(receipts) <= MaxReceipts

Init ==
    /\ pools = EmptyPools(PageCount, WindowCount)
    /\ tree = <<>> /\ dead = {} /\ last = <<>>
    /\ locks = <<>> /\ windowLocks = <<>>
    /\ receipts = <<>>
    /\ did = [name |-> "nothing"]

-----------------------------------------------------------------------------
\* SWARADIX-1, SWARADIX-2: what the match gives is renewed, what it only compared is not.
Match(key) ==
    /\ last' = Touched(last, Prefixes(Matched(tree, dead, key)))
    /\ did' = [name |-> "match", key |-> key]
    /\ UNCHANGED <<pools, tree, dead, locks, windowLocks, receipts>>

\* The first `shared` pages of the tree, then the next ones of the pools: what a caller inserts.
Value(key, shared) ==
    LET fresh == NextPages(pools, Len(key) - shared)
    IN  [n \in 1..Len(key) |-> IF n <= shared THEN tree[SubSeq(key, 1, n)] ELSE fresh[n - shared]]

\* SWARADIX-3 to SWARADIX-5, CACHE-8: a caller that has matched `shared` pages computed the rest and
\* let go of the pairs at `bare`; the pages that the tree does not take go back.
Insert(key, shared, bare) ==
    LET value   == Value(key, shared)
        own     == { value[n] : n \in shared + 1..Len(key) }
        brought == Given(Taken(pools, Cardinality(own)), {}, { value[n] : n \in bare })
        after   == Inserted(tree, dead, brought, key, value)
    IN  /\ tree' = after.tree
        /\ dead' = after.dead
        /\ pools' = Given(after.pools, own \cap NotTaken(after.tree, value), {})
        /\ last' = Touched(last, Prefixes(after.reach))
        /\ locks' = With(locks, Prefixes(after.reach), LAMBDA p : 0)
        /\ windowLocks' = With(windowLocks, Prefixes(after.reach), LAMBDA p : 0)
        /\ did' = [name |-> "insert", key |-> key, shared |-> shared, bare |-> bare]
        /\ UNCHANGED receipts

\* CACHE-8: every page of the key is the caller's own, or only those that a match did not give.
InsertComputed(key, bare) == CanTake(pools, Len(key)) /\ Insert(key, 0, bare)
InsertMatched(key, bare) ==
    LET shared == MatchLength(tree, dead, key)
    IN  /\ shared > 0 /\ bare \subseteq shared + 1..Len(key)
        /\ CanTake(pools, Len(key) - shared)
        /\ Insert(key, shared, bare)

-----------------------------------------------------------------------------
Now == [paths |-> DOMAIN tree, dead |-> dead]

LiveIn(at) == at.paths \ at.dead

\* Whether p is the next of two: walked longer ago, or at once and nearer to the root.
IsBefore(p, q) == last[p] < last[q] \/ (last[p] = last[q] /\ Len(p) <= Len(q))

First(S) == CHOOSE p \in S : \A q \in S : IsBefore(p, q)

\* SWARADIX-12: until n full pages have gone, the unlocked leaf walked longest ago.
RECURSIVE Phase1(_, _)
Phase1(at, n) ==
    LET leaves == { p \in Leaves(at.paths) : locks[p] = 0 }
        after  == Shrunk(at.paths, at.dead, First(leaves))
        went   == Cardinality(at.paths) - Cardinality(after.paths)
    IN  IF n = 0 \/ leaves = {} THEN at
        ELSE Phase1(after, IF went < n THEN n - went ELSE 0)

\* SWARADIX-13, SWARADIX-14, SWARADIX-15: until n window pages have gone, the next live page
\* without a window lock.
RECURSIVE Phase2(_, _)
Phase2(at, n) ==
    LET live == { p \in LiveIn(at) : windowLocks[p] = 0 \/ Bug = "ignores window locks" }
    IN  IF n = 0 \/ live = {} THEN at
        ELSE Phase2(Shrunk(at.paths, at.dead, First(live)), n - 1)

\* SWARADIX-13: the window pages that have gone, of those that were there.
WentFromWindow(after) == Cardinality(LiveIn(Now) \ LiveIn(after))

\* How many full and window pages an eviction may ask for.
Amounts == { <<1, 0>>, <<2, 0>>, <<0, 1>>, <<0, 2>>, <<1, 2>> }

\* SWARADIX-12, SWARADIX-13, SWARADIX-16: what phase 1 took from the window pool counts.
Evict(n, m) ==
    LET first == Phase1(Now, n)
        went  == WentFromWindow(first)
        after == Phase2(first, IF went < m THEN m - went ELSE 0)
        gone  == DOMAIN tree \ after.paths
    IN  /\ pools' = GivenByEviction(tree, dead, pools, after)
        /\ tree' = Without(tree, gone)
        /\ dead' = after.dead
        /\ last' = Ranked(Without(last, gone))
        /\ locks' = Without(locks, gone)
        /\ windowLocks' = Without(windowLocks, gone)
        /\ did' = [name |-> "evict", full |-> n, window |-> m]
        /\ UNCHANGED receipts

-----------------------------------------------------------------------------
More(map, S)  == [p \in DOMAIN map |-> map[p] + IF p \in S THEN 1 ELSE 0]
Fewer(map, S) == [p \in DOMAIN map |-> map[p] - IF p \in S THEN 1 ELSE 0]

\* CACHE-11, SWARADIX-9: every page of the path, and the last ones of it for the window.
Locked(p) ==
    /\ Len(receipts) < MaxReceipts
    /\ locks' = More(locks, Prefixes(p))
    /\ windowLocks' = More(windowLocks, WindowOf(p))
    /\ receipts' = Append(receipts, p)
    /\ did' = [name |-> "lock", path |-> p]
    /\ UNCHANGED <<pools, tree, dead, last>>

\* SWARADIX-11: the window of the path is live.
Lock(p) == p \in DOMAIN tree /\ Lockable(tree, dead, p) /\ Locked(p)

\* CACHE-2: a request locks what it has cached to the end of its reach, whatever lies before.
LockReach(p) == p \in DOMAIN tree \ dead /\ ~Lockable(tree, dead, p) /\ Locked(p)

\* SWARADIX-11: it is not.
LockRefused(p) ==
    /\ p \in DOMAIN tree /\ ~Lockable(tree, dead, p)
    /\ did' = [name |-> "refused", path |-> p]
    /\ UNCHANGED state

\* The bug: the last live pages of a path, which are others than when it was locked.
LiveTail(p) ==
    { q \in Prefixes(p) \ dead :
        Cardinality({ r \in Prefixes(p) \ dead : q \in Prefixes(r) }) <= Window }

\* CACHE-12, SWARADIX-9: exactly what this receipt locked.
Unlock(i) ==
    LET p == receipts[i]
    IN  /\ i <= Len(receipts)
        /\ locks' = Fewer(locks, Prefixes(p))
        /\ windowLocks' = Fewer(windowLocks,
                                IF Bug = "unlocks by state" THEN LiveTail(p) ELSE WindowOf(p))
        /\ receipts' = RemoveAt(receipts, i)
        /\ did' = [name |-> "unlock", path |-> p]
        /\ UNCHANGED <<pools, tree, dead, last>>

Next ==
    \/ \E key \in Keys :
        \/ Match(key)
        \/ \E bare \in SUBSET (1..Len(key)) : InsertComputed(key, bare) \/ InsertMatched(key, bare)
    \/ \E amount \in Amounts : Evict(amount[1], amount[2])
    \/ \E p \in Keys : Lock(p) \/ LockReach(p) \/ LockRefused(p)
    \/ \E i \in 1..MaxReceipts : Unlock(i)

Spec == Init /\ [][Next]_vars

-----------------------------------------------------------------------------
Owners(f) ==
    (IF f \in pools.free THEN {"free"} ELSE {}) \cup (IF f \in Range(tree) THEN {"tree"} ELSE {})

WindowOwners(w) ==
    UNION { Owners(f) : f \in { g \in DOMAIN pools.pair : pools.pair[g] = w } }
    \cup (IF w \in pools.windowFree THEN {"free"} ELSE {})

\* CACHE-1: every page of either pool has one owner.
CACHE_1_OneOwner ==
    /\ \A f \in 1..PageCount : Cardinality(Owners(f)) = 1
    /\ \A w \in 1..WindowCount : Cardinality(WindowOwners(w)) = 1

SWA_1_EachPageOnce == EachPageOnce(pools, PageCount, WindowCount)
SWA_2_PairsAreHeld == PairsAreHeld(pools)

\* RADIX-5: prefix-closed, and one page for each path.
RADIX_5_PrefixClosed == IsPrefixClosed(DOMAIN tree)
RADIX_5_OnePagePerPath == \A p, q \in DOMAIN tree : tree[p] = tree[q] => p = q

\* RADIX-6: the locks that are counted are the receipts that are open.
RADIX_6_LocksAreReceipts ==
    \A p \in DOMAIN tree :
        locks[p] = Cardinality({ i \in DOMAIN receipts : p \in Prefixes(receipts[i]) })

\* SWARADIX-1: what is found is usable, and nothing longer is.
SWARADIX_1_LongestUsable ==
    \A key \in Keys :
        /\ Usable(tree, dead, Matched(tree, dead, key))
        /\ \A n \in MatchLength(tree, dead, key) + 1..Len(key) :
             ~Usable(tree, dead, SubSeq(key, 1, n))

SWARADIX_7_LeavesAreLive == LeavesAreLive(tree, dead)
SWARADIX_8_LiveArePaired == LiveArePaired(tree, dead, pools)

\* SWARADIX-9: the window locks that are counted are the receipts that are open.
SWARADIX_9_WindowLocksAreReceipts ==
    \A p \in DOMAIN tree :
        /\ windowLocks[p] = Cardinality({ i \in DOMAIN receipts : p \in WindowOf(receipts[i]) })
        /\ windowLocks[p] <= locks[p]

\* SWARADIX-11: a path that is locked is resident and ends in a live page.
SWARADIX_11_LockedEndsLive ==
    \A i \in DOMAIN receipts :
        Prefixes(receipts[i]) \subseteq DOMAIN tree /\ receipts[i] \notin dead

\* SWARADIX-14: the order leaves no choice, and a prefix is no older than what extends it.
SWARADIX_14_OneIsNext ==
    \A p, q \in DOMAIN tree :
        /\ last[p] = last[q] /\ Len(p) = Len(q) => p = q
        /\ p \in Prefixes(q) => last[p] >= last[q]

-----------------------------------------------------------------------------
Called(name) == did'.name = name

\* SWARADIX-2: what a match does not give keeps its order, behind what it gives.
SWARADIX_2_OthersAsTheyWere ==
    [][Called("match") =>
        LET given == Prefixes(Matched(tree, dead, did'.key))
        IN  \A p, q \in DOMAIN tree \ given :
                /\ last[p] < last[q] <=> last'[p] < last'[q]
                /\ \A r \in given : last'[p] < last'[r]]_vars

\* Whether the caller of the insert brings a pair for its n-th page.
Brings(n) == n > did'.shared /\ n \notin did'.bare

\* SWARADIX-3: the pages up to the last that is live afterwards become resident, and no other.
SWARADIX_3_TheReach ==
    [][Called("insert") =>
        LET key == did'.key
        IN  DOMAIN tree' \ DOMAIN tree =
              { p \in Prefixes(key) \ DOMAIN tree :
                  \E n \in Len(p)..Len(key) :
                      SubSeq(key, 1, n) \in DOMAIN tree \ dead \/ Brings(n) }]_vars

\* SWARADIX-4: what enters is live if the caller brought a pair.
SWARADIX_4_EntersAsBrought ==
    [][Called("insert") =>
        \A p \in DOMAIN tree' \ DOMAIN tree : p \in dead' <=> ~Brings(Len(p))]_vars

\* SWARADIX-5: tombstones are revived for which the caller brought a pair, and no other.
SWARADIX_5_Revives ==
    [][Called("insert") =>
        \A p \in dead : p \notin dead' <=> p \in Prefixes(did'.key) /\ Brings(Len(p))]_vars

\* CACHE-9: what stays resident keeps its full page.
CACHE_9_PagesStay == [][\A p \in DOMAIN tree \cap DOMAIN tree' : tree'[p] = tree[p]]_vars

Gone == DOMAIN tree \ DOMAIN tree'

\* What leaves if the live pages of S do.
Leaving(S) == S \cup { p \in dead : \A q \in DOMAIN tree \ dead : p \in Prefixes(q) => q \in S }

\* The live page that left last: of one path, the end goes first.
LeftLast == CHOOSE p \in Gone \ dead : \A q \in Gone \ dead :
                last[q] < last[p] \/ (last[q] = last[p] /\ Len(p) <= Len(q))

\* SWARADIX-12: unlocked leaves and what they leave behind, the oldest first, enough and no more.
SWARADIX_12_OldestLeavesGo ==
    [][Called("evict") /\ did'.window = 0 =>
        /\ \A p \in Gone : locks[p] = 0
        /\ Gone = Leaving(Gone \ dead) /\ dead' = dead \ Gone
        /\ \A p \in Gone \ dead : \A q \in Leaves(DOMAIN tree) \ Gone :
             locks[q] = 0 => last[p] <= last[q]
        /\ Cardinality(Gone) < did'.full => \A p \in Leaves(DOMAIN tree') : locks[p] > 0
        /\ Gone # {} => Cardinality(Leaving((Gone \ dead) \ {LeftLast})) < did'.full]_vars

\* Live pages that an eviction may take from the window pool, and those that it took.
Takeable   == { p \in DOMAIN tree \ dead : windowLocks[p] = 0 }
FromWindow == (Gone \ dead) \cup (dead' \ dead)

\* SWARADIX-13: as many as were asked for; they are tombstones while something live extends them.
SWARADIX_13_TombstonesOrLeaves ==
    [][Called("evict") =>
        /\ Cardinality(FromWindow) < did'.window => Takeable \subseteq FromWindow
        /\ Cardinality(FromWindow) > did'.window => dead' \subseteq dead
        /\ did'.full = 0 =>
             /\ Cardinality(FromWindow) <= did'.window
             /\ DOMAIN tree' = Trimmed(DOMAIN tree, dead \cup FromWindow)
             /\ dead' = (dead \cup FromWindow) \cap DOMAIN tree']_vars

\* SWARADIX-14: those walked longest ago, and of those walked at once those nearest to the root.
SWARADIX_14_OldestFirst ==
    [][Called("evict") /\ did'.full = 0 =>
        \A p \in FromWindow : \A q \in Takeable \ FromWindow : IsBefore(p, q)]_vars

\* SWARADIX-15: a page under a window lock keeps its pair, whatever is called.
SWARADIX_15_WindowLockedStays ==
    [][\A p \in DOMAIN tree \ dead :
        windowLocks[p] > 0 =>
            /\ p \in DOMAIN tree' \ dead'
            /\ pools'.pair[tree'[p]] = pools.pair[tree[p]]]_vars
=============================================================================
