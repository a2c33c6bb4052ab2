---------------------------- MODULE SWAKvSystem ----------------------------
(* The allocator of two pools and the radix cache with windows at work, and  *)
(* requests that live through them.  Clause ids refer to prefix_cache.md of  *)
(* spec/, the SWA to swa_allocator.md, the SWARADIX to swa_radix_cache.md.   *)
(*                                                                           *)
(*   row:   [0 .... protected)     [protected .. fill)  [fill .. allocated)  *)
(*   owner: the tree, by the lock  the request          the request          *)
(*                                                                           *)
(* Everything is in whole pages; what happens within one is in KvSystem.     *)
(* Which page is evicted is left open, so every order is covered.  A request *)
(* that ends, finished or retracted, comes again, so that it meets the tree  *)
(* that it and the others left.                                              *)
EXTENDS Windows

CONSTANTS PageCount,    \* the full pages are 1 .. PageCount
          WindowCount,  \* the window pages are 1 .. WindowCount
          Text,         \* [requests -> Seq(symbols)]: prompt, then what will be sampled
          MaxStep,      \* largest extension, in pages
          Inserts       \* keys that callers without a row insert

VARIABLES pools,        \* the allocator, as in Windows
          tree,         \* [resident paths -> full pages]
          dead,         \* SUBSET paths: the tombstones
          phase,        \* [requests -> {"waiting", "running"}]
          row,          \* [requests -> Seq(full pages)]
          fill,         \* [requests -> Nat]: pages computed, the committed length
          protected,    \* [requests -> Nat]: cache_protected_len
          lock,         \* [requests -> path]: of the open receipt; the root locks nothing
          behind,       \* [requests -> Nat]: how far it has told evict_swa to go
          did           \* the last call and whose; no step reads it

requests == <<phase, row, fill, protected, lock, behind>>
state    == <<pools, tree, dead, requests>>
vars     == <<state, did>>

Requests == DOMAIN Text
Root     == <<>>
Nobody   == "nobody"

Running      == { r \in Requests : phase[r] = "running" }
PathOf(r, n) == SubSeq(Text[r], 1, n)

\* CACHE-1: the pages of row[protected : allocated).
Own(r) == { row[r][i] : i \in protected[r] + 1..Len(row[r]) }

\* What the locks of the requests cover; the window locks, the last pages of each.
Locked       == UNION { Prefixes(lock[r]) : r \in Running }
WindowLocked == UNION { WindowOf(lock[r]) : r \in Running }

TypeOK ==
    /\ dead \subseteq DOMAIN tree
    /\ phase \in [Requests -> {"waiting", "running"}]
    /\ \A r \in Requests :
         protected[r] <= fill[r] /\ fill[r] <= Len(row[r]) /\ Len(row[r]) <= Len(Text[r])

Init ==
    /\ pools = EmptyPools(PageCount, WindowCount)
    /\ tree = <<>> /\ dead = {}
    /\ phase = [r \in Requests |-> "waiting"]
    /\ row = [r \in Requests |-> <<>>]
    /\ fill = [r \in Requests |-> 0]
    /\ protected = [r \in Requests |-> 0]
    /\ lock = [r \in Requests |-> Root]
    /\ behind = [r \in Requests |-> 0]
    /\ did = [name |-> "nothing", who |-> Nobody]

-----------------------------------------------------------------------------
Did(name, who) == did' = [name |-> name, who |-> who]

\* CACHE-11, SWARADIX-11: a row of what a match of the prompt gave, now or some time ago, and a lock
\* on it.  The last page of a prompt is always computed.
Admit(r) ==
    \E n \in 0..Len(Text[r]) - 1 :
        /\ phase[r] = "waiting" /\ Lockable(tree, dead, PathOf(r, n))
        /\ phase' = [phase EXCEPT ![r] = "running"]
        /\ row' = [row EXCEPT ![r] = [i \in 1..n |-> tree[PathOf(r, i)]]]
        /\ fill' = [fill EXCEPT ![r] = n]
        /\ protected' = [protected EXCEPT ![r] = n]
        /\ lock' = [lock EXCEPT ![r] = PathOf(r, n)]
        /\ Did("admit", r)
        /\ UNCHANGED <<pools, tree, dead, behind>>

Wants(r, n) ==
    phase[r] = "running" /\ fill[r] = Len(row[r]) /\ fill[r] + n <= Len(Text[r])

\* SWA-3, SWA-6: n more pages, each with its pair.
Extend(r, n) ==
    /\ Wants(r, n) /\ CanTake(pools, n)
    /\ row' = [row EXCEPT ![r] = @ \o NextPages(pools, n)]
    /\ pools' = Taken(pools, n)
    /\ Did("extend", r)
    /\ UNCHANGED <<tree, dead, phase, fill, protected, lock, behind>>

\* SWA-4: either pool is short.
ExtendRefused(r, n) ==
    /\ Wants(r, n) /\ ~CanTake(pools, n)
    /\ Did("refused", r)
    /\ UNCHANGED state

\* No clause, the forward pass: the pages allocated hold KV.
Compute(r) ==
    /\ phase[r] = "running" /\ fill[r] < Len(row[r])
    /\ fill' = [fill EXCEPT ![r] = Len(row[r])]
    /\ Did("compute", r)
    /\ UNCHANGED <<pools, tree, dead, phase, row, protected, lock, behind>>

\* CACHE-19: what lies before the last window of n pages.
Frontier(n) ==
    LET kept == IF Bug = "keeps what is read" THEN Window - 1 ELSE Window
    IN  IF n > kept THEN n - kept ELSE 0

\* CACHE-19: pages of row[protected : frontier) that have a pair, if n pages count as computed.
LeftBehind(r, n) == { row[r][i] : i \in protected[r] + 1..Frontier(n) } \cap DOMAIN pools.pair

\* CACHE-19, SWA-10: their pairs go back.
EvictSwa(r, n) ==
    /\ LeftBehind(r, n) # {}
    /\ pools' = Given(pools, {}, LeftBehind(r, n))
    /\ behind' = [behind EXCEPT ![r] = Frontier(n)]
    /\ Did("evict_swa", r)
    /\ UNCHANGED <<tree, dead, phase, row, fill, protected, lock>>

\* CACHE-20: a caller that is ahead counts what is still to be computed.
EvictSwaComputed(r)  == phase[r] = "running" /\ EvictSwa(r, fill[r])
EvictSwaAllocated(r) == fill[r] < Len(row[r]) /\ EvictSwa(r, Len(row[r]))

Cached(r) == Inserted(tree, dead, pools, PathOf(r, fill[r]), SubSeq(row[r], 1, fill[r]))

\* CACHE-2, CACHE-3: row and lock follow the tree up to the reach; duplicates go back.
CacheUnfinished(r) ==
    LET after == Cached(r)
        reach == Len(after.reach)
        Followed(i) == IF i <= reach THEN after.tree[PathOf(r, i)] ELSE row[r][i]
    IN  /\ fill[r] > protected[r]
        /\ tree' = after.tree
        /\ dead' = after.dead
        /\ pools' = Given(after.pools,
                          { row[r][i] : i \in protected[r] + 1..reach } \ Range(after.tree), {})
        /\ row' = [row EXCEPT ![r] = [i \in DOMAIN @ |-> Followed(i)]]
        /\ protected' = [protected EXCEPT ![r] = reach]
        /\ lock' = [lock EXCEPT ![r] = after.reach]
        /\ Did("cache_unfinished_req", r)
        /\ UNCHANGED <<phase, fill, behind>>

\* CACHE-12: the row is free and the lock released.
Leave(r) ==
    /\ phase' = [phase EXCEPT ![r] = "waiting"]
    /\ row' = [row EXCEPT ![r] = <<>>]
    /\ fill' = [fill EXCEPT ![r] = 0]
    /\ protected' = [protected EXCEPT ![r] = 0]
    /\ lock' = [lock EXCEPT ![r] = Root]
    /\ behind' = [behind EXCEPT ![r] = 0]

\* CACHE-4: duplicates and all that is beyond the reach go back.
CacheFinished(r) ==
    /\ fill[r] > 0
    /\ tree' = Cached(r).tree
    /\ dead' = Cached(r).dead
    /\ pools' = Given(Cached(r).pools, Own(r) \ Range(tree'), {})
    /\ Leave(r)
    /\ Did("cache_finished_req", r)

\* SWA-8, CACHE-12: a request that is given up caches nothing; what it owns goes back.
Retract(r) ==
    /\ phase[r] = "running"
    /\ pools' = Given(pools, Own(r), {})
    /\ Leave(r)
    /\ Did("retract", r)
    /\ UNCHANGED <<tree, dead>>

Shrink(p, name) ==
    LET after == Shrunk(DOMAIN tree, dead, p)
    IN  /\ pools' = GivenByEviction(tree, dead, pools, after)
        /\ tree' = Without(tree, DOMAIN tree \ after.paths)
        /\ dead' = after.dead
        /\ Did(name, Nobody)
        /\ UNCHANGED requests

\* SWARADIX-12: a leaf that nobody locks goes, with the tombstones that this makes leaves.
EvictFull == \E p \in Leaves(DOMAIN tree) \ Locked : Shrink(p, "evict full")

\* SWARADIX-13, SWARADIX-15: a live page goes from the window pool that nobody's window needs.
EvictWindow ==
    \E p \in DOMAIN tree \ dead :
        /\ p \notin WindowLocked \/ Bug = "ignores window locks"
        /\ Shrink(p, "evict window")

\* CACHE-8: a caller without a row computed all of a key, and gives back what the tree did not take.
InsertByOther(key) ==
    LET value == NextPages(pools, Len(key))
        after == Inserted(tree, dead, Taken(pools, Len(key)), key, value)
    IN  /\ CanTake(pools, Len(key))
        /\ tree' = after.tree
        /\ dead' = after.dead
        /\ pools' = Given(after.pools, NotTaken(after.tree, value), {})
        /\ Did("insert", Nobody)
        /\ UNCHANGED requests

Next ==
    \/ \E r \in Requests :
        \/ Admit(r)
        \/ \E n \in 1..MaxStep : Extend(r, n) \/ ExtendRefused(r, n)
        \/ Compute(r) \/ EvictSwaComputed(r) \/ EvictSwaAllocated(r)
        \/ CacheUnfinished(r) \/ CacheFinished(r) \/ Retract(r)
    \/ EvictFull \/ EvictWindow
    \/ \E key \in Inserts : InsertByOther(key)

Spec == Init /\ [][Next]_vars

-----------------------------------------------------------------------------
Owners(f) ==
    { r \in Running : f \in Own(r) }
    \cup (IF f \in pools.free THEN {"free"} ELSE {})
    \cup (IF f \in Range(tree) THEN {"tree"} ELSE {})

WindowOwners(w) ==
    UNION { Owners(f) : f \in { g \in DOMAIN pools.pair : pools.pair[g] = w } }
    \cup (IF w \in pools.windowFree THEN {"free"} ELSE {})

\* CACHE-1: every page of either pool has one owner.
CACHE_1_OneOwner ==
    /\ \A f \in 1..PageCount : Cardinality(Owners(f)) = 1
    /\ \A w \in 1..WindowCount : Cardinality(WindowOwners(w)) = 1

\* CACHE-1: up to the protected length a row is what the tree holds on the path of its lock.
CACHE_1_RowFollowsTree ==
    \A r \in Running :
        /\ lock[r] = PathOf(r, protected[r])
        /\ \A i \in 1..protected[r] :
             PathOf(r, i) \in DOMAIN tree /\ row[r][i] = tree[PathOf(r, i)]

\* CACHE-1: no live row names a page that is free, another request's or twice its own.
CACHE_1_NoDanglingRow ==
    \A r \in Running :
        /\ Range(row[r]) \cap pools.free = {}
        /\ \A s \in Running \ {r} : Range(row[r]) \cap Own(s) = {}
        /\ Cardinality(Range(row[r])) = Len(row[r])

\* CACHE-4: who is not running has no row and no lock.
CACHE_4_NothingHeldAfterwards ==
    \A r \in Requests \ Running : row[r] = <<>> /\ lock[r] = Root

RADIX_5_PrefixClosed == IsPrefixClosed(DOMAIN tree)
RADIX_5_OnePagePerPath == \A p, q \in DOMAIN tree : tree[p] = tree[q] => p = q

SWA_1_EachPageOnce == EachPageOnce(pools, PageCount, WindowCount)
SWA_2_PairsAreHeld == PairsAreHeld(pools)
SWARADIX_7_LeavesAreLive == LeavesAreLive(tree, dead)
SWARADIX_8_LiveArePaired == LiveArePaired(tree, dead, pools)

\* SWARADIX-11: a path that is locked is resident and ends in a live page.
SWARADIX_11_LockedEndsLive ==
    \A r \in Running : Prefixes(lock[r]) \subseteq DOMAIN tree /\ lock[r] \notin dead

\* SWARADIX-18: the pages that a request attends to next have their pairs, whoever owns them, unless
\* it left them behind itself.
SWARADIX_18_WindowKept ==
    \A r \in Running : \A i \in Largest({behind[r], Frontier(fill[r])}) + 1..Len(row[r]) :
        row[r][i] \in DOMAIN pools.pair

\* SWARADIX-1, CACHE-19: a request that is not ahead of itself can find again what it has cached.
SWARADIX_1_CachedIsFound ==
    \A r \in Running :
        behind[r] <= Frontier(protected[r]) => Usable(tree, dead, lock[r])

-----------------------------------------------------------------------------
Called(name) == did'.name = name
Caller == did'.who

\* SWA-4: pages are taken from both pools alike, or from none, which is when either is short.
SWA_4_BothOrNeither ==
    [][/\ Called("extend") =>
            LET fresh == { row'[Caller][i] : i \in Len(row[Caller]) + 1..Len(row'[Caller]) }
            IN  /\ fresh = pools.free \ pools'.free
                /\ Cardinality(fresh) = Cardinality(pools.windowFree \ pools'.windowFree)
                /\ fresh \subseteq DOMAIN pools'.pair
       /\ Called("refused") => pools' = pools /\ row' = row]_vars

\* CACHE-2: everything up to the last page that is live afterwards is in the tree, and locked.
CACHE_2_RowFollowsReach ==
    [][Called("cache_unfinished_req") =>
        LET r == Caller
            end == Largest({0} \cup { i \in 1..fill[r] :
                                        \/ PathOf(r, i) \in DOMAIN tree \ dead
                                        \/ row[r][i] \in DOMAIN pools.pair })
        IN  /\ protected'[r] = end /\ protected'[r] >= protected[r]
            /\ Prefixes(PathOf(r, end)) \subseteq DOMAIN tree'
            /\ SubSeq(row'[r], end + 1, Len(row'[r])) = SubSeq(row[r], end + 1, Len(row[r]))]_vars

\* CACHE-3: exactly the request's pages that duplicate the tree's go back.
CACHE_3_DuplicatesGoBack ==
    [][Called("cache_unfinished_req") =>
        LET r == Caller
        IN  pools'.free \ pools.free =
              { row[r][i] : i \in { j \in protected[r] + 1..protected'[r] :
                  PathOf(r, j) \in DOMAIN tree /\ tree[PathOf(r, j)] # row[r][j] } }]_vars

\* CACHE-4: what the request owned is in the tree or free.
CACHE_4_NothingKept ==
    [][Called("cache_finished_req") =>
        pools'.free = pools.free \cup (Own(Caller) \ Range(tree'))]_vars

\* CACHE-9: what stays resident keeps its full page.
CACHE_9_PagesStay == [][\A p \in DOMAIN tree \cap DOMAIN tree' : tree'[p] = tree[p]]_vars

\* CACHE-19: exactly the pairs behind the frontier of what the request owns.
CACHE_19_OnlyLeftBehind ==
    [][Called("evict_swa") =>
        /\ DOMAIN pools'.pair = DOMAIN pools.pair
             \ { row[Caller][i] : i \in protected[Caller] + 1..behind'[Caller] }
        /\ pools'.held = pools.held
        /\ Cardinality(pools.windowHeld) - Cardinality(pools'.windowHeld) =
             Cardinality(DOMAIN pools.pair) - Cardinality(DOMAIN pools'.pair)]_vars

\* Full pages whose pairs are the request's own, or under its window lock.
InWindow(r) == Own(r) \cup { tree[p] : p \in WindowOf(lock[r]) }

\* SWARADIX-15, SWARADIX-18: nobody's call takes what another request holds, in either pool.
SWARADIX_18_OthersKeepTheirs ==
    [][\A r \in Running \ {Caller} :
        /\ Range(row[r]) \cap pools'.free = {}
        /\ \A f \in InWindow(r) \cap DOMAIN pools.pair :
             f \in DOMAIN pools'.pair /\ pools'.pair[f] = pools.pair[f]]_vars
=============================================================================
