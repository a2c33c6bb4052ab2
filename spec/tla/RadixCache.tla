----------------------------- MODULE RadixCache -----------------------------
(* The radix cache at page granularity under lru.  Clause ids refer to       *)
(* spec/radix_cache.md and spec/prefix_cache.md.  A path has one symbol for  *)
(* each page; how many tokens that are makes no difference.  The law:        *)
(*                                                                           *)
(*     free \cup Range(tree) = Pages, and no page occurs twice               *)
(*                                                                           *)
(* Pages come from a pool that hands out the smallest free one.  The client  *)
(* keeps one handle; to begin with, one from before a reset.                 *)
EXTENDS Trie

CONSTANTS PageCount,    \* the pages are 1 .. PageCount
          Symbols,      \* what a page of tokens can be
          Depth,        \* longest key, in pages
          MaxReceipts,  \* how many receipts can be open at once
          Kept          \* paths that the client keeps handles of

VARIABLES free,         \* SUBSET Pages
          tree,         \* [resident paths -> Pages]
          last,         \* [resident paths -> rank of the last access, 0 the oldest]
          locks,        \* [resident paths -> how often they are locked]
          receipts,     \* Seq(paths): the open receipts, oldest first
          handle        \* [path, live]: what the client keeps

vars == <<free, tree, last, locks, receipts, handle>>

Pages == 1..PageCount
Keys  == UNION { [1..d -> Symbols] : d \in 1..Depth }
Root  == <<>>
Paths == Keys \cup {Root}

TypeOK ==
    /\ free \subseteq Pages
    /\ DOMAIN tree \subseteq Keys /\ Range(tree) \subseteq Pages
    /\ DOMAIN last = DOMAIN tree /\ DOMAIN locks = DOMAIN tree
    /\ receipts \in Seq(Paths) /\ Len(receipts) <= MaxReceipts
    /\ handle \in [path : Paths, live : BOOLEAN]

Init ==
    /\ free = Pages
    /\ tree = <<>> /\ last = <<>> /\ locks = <<>>
    /\ receipts = <<>>
    /\ handle = [path |-> Root, live |-> FALSE]

-----------------------------------------------------------------------------
\* CACHE-14: the client drops the handle it is given, or keeps it and drops the old one.
MayKeep(p) ==
    \/ UNCHANGED handle
    \/ p \in Kept /\ handle' = [path |-> p, live |-> TRUE]

\* CACHE-14: what leaves the tree takes its handles along.
Outdate(gone) == handle' = [handle EXCEPT !.live = @ /\ handle.path \notin gone]

\* RADIX-1, RADIX-3: a match moves what it covers to the front.
Match(key) ==
    /\ last' = Touched(last, Prefixes(Found(tree, key)))
    /\ MayKeep(Found(tree, key))
    /\ UNCHANGED <<free, tree, locks, receipts>>

\* RADIX-3: without touch it changes nothing.
Peek(key) == Found(tree, key) # Root /\ UNCHANGED vars

\* RADIX-4, CACHE-9: all of the key becomes resident; what was there keeps its page.
Grow(key, pageOf(_)) ==
    /\ tree' = With(tree, Prefixes(key), pageOf)
    /\ locks' = With(locks, Prefixes(key), LAMBDA p : 0)
    /\ last' = Touched(last, Prefixes(key))
    /\ free' = Pages \ Range(tree')
    /\ MayKeep(key)
    /\ UNCHANGED receipts

\* CACHE-8: the caller computed every page of the key itself; duplicates go back at once.
InsertComputed(key) ==
    /\ Len(key) <= Cardinality(free)
    /\ LET fresh == Smallest(free, Len(key)) IN Grow(key, LAMBDA p : fresh[Len(p)])

\* CACHE-8: the caller shares what a match gave and computed the rest.
InsertMatched(key) ==
    LET found == FoundLength(tree, key)
    IN  /\ Len(key) - found <= Cardinality(free)
        /\ LET fresh == Smallest(free, Len(key) - found)
           IN  Grow(key, LAMBDA p : fresh[Len(p) - found])

\* RADIX-8, RADIX-11, RADIX-13: up to n pages, each time the leaf without lock walked longest ago.
RECURSIVE Victims(_, _)
Victims(resident, n) ==
    LET leaves == { p \in Leaves(resident) : locks[p] = 0 }
    IN  IF n = 0 \/ leaves = {} THEN {}
        ELSE LET oldest == CHOOSE p \in leaves : \A q \in leaves : last[p] <= last[q]
             IN  {oldest} \cup Victims(resident \ {oldest}, n - 1)

\* RADIX-8, RADIX-10: the victims leave and their pages are free again.
Evict(n) ==
    LET gone == Victims(DOMAIN tree, n)
    IN  /\ tree' = Without(tree, gone)
        /\ locks' = Without(locks, gone)
        /\ last' = Ranked(Without(last, gone))
        /\ free' = free \cup { tree[p] : p \in gone }
        /\ Outdate(gone)
        /\ UNCHANGED receipts

\* CACHE-11: every page of the path once more.
Lock ==
    /\ handle.live
    /\ Len(receipts) < MaxReceipts
    /\ locks' = [p \in DOMAIN locks |-> locks[p] + IF p \in Prefixes(handle.path) THEN 1 ELSE 0]
    /\ receipts' = Append(receipts, handle.path)
    /\ UNCHANGED <<free, tree, last, handle>>

\* CACHE-13: a stale handle locks nothing.
LockRefused == ~handle.live /\ UNCHANGED vars

\* CACHE-12: exactly what this receipt locked, whatever came in between.
Release(i) ==
    /\ locks' = [p \in DOMAIN locks |-> locks[p] - IF p \in Prefixes(receipts[i]) THEN 1 ELSE 0]
    /\ receipts' = RemoveAt(receipts, i)
    /\ UNCHANGED <<free, tree, last, handle>>

Unlock == \E i \in 1..Len(receipts) : Release(i)

Own == { i \in 1..Len(receipts) : handle.live /\ receipts[i] = handle.path }

\* CACHE-12: by handle, its oldest receipt.
UnlockNode == \E i \in Own : (\A j \in Own : i <= j) /\ Release(i)

\* CACHE-13: a handle without a receipt, or a stale one, unlocks nothing.
UnlockRefused == Own = {} /\ UNCHANGED vars

\* CACHE-13: a receipt that has been consumed unlocks nothing.  The client has one from the start.
SpentRefused == UNCHANGED vars

\* CACHE-15: everything is free and every handle stale.
Reset ==
    /\ receipts = <<>>
    /\ free' = Pages
    /\ tree' = <<>> /\ last' = <<>> /\ locks' = <<>>
    /\ handle' = [handle EXCEPT !.live = FALSE]
    /\ UNCHANGED receipts

\* CACHE-16: not while a receipt is open.
ResetRefused == receipts # <<>> /\ UNCHANGED vars

Next ==
    \/ \E key \in Keys : Match(key) \/ Peek(key) \/ InsertComputed(key) \/ InsertMatched(key)
    \/ \E n \in 1..2 : Evict(n)
    \/ Lock \/ LockRefused
    \/ Unlock \/ UnlockNode \/ UnlockRefused \/ SpentRefused
    \/ Reset \/ ResetRefused

Spec == Init /\ [][Next]_vars

-----------------------------------------------------------------------------
Covers(p) == Cardinality({ i \in 1..Len(receipts) : p \in Prefixes(receipts[i]) })

\* RADIX-5: prefix-closed, and one page for each path.
RADIX_5_PrefixClosed == IsPrefixClosed(DOMAIN tree)
RADIX_5_OnePagePerPath == \A p, q \in DOMAIN tree : tree[p] = tree[q] => p = q

\* RADIX-6: the locks that are counted are the receipts that are open.
RADIX_6_LocksAreReceipts == \A p \in DOMAIN tree : locks[p] = Covers(p)
RADIX_6_PrefixLockedAsOften == \A p \in DOMAIN tree : \A q \in Prefixes(p) : locks[q] >= locks[p]

\* RADIX-8: what is not locked can be evicted, all of it.
RADIX_8_UnlockedCanGo == Victims(DOMAIN tree, PageCount) = { p \in DOMAIN tree : locks[p] = 0 }

\* RADIX-10: what is not in the tree is free, once.
RADIX_10_NothingLost ==
    /\ free \cup Range(tree) = Pages
    /\ Cardinality(free) + Cardinality(DOMAIN tree) = PageCount

\* RADIX-11: the path of an open receipt is resident.
RADIX_11_LockedIsResident ==
    \A i \in 1..Len(receipts) : Prefixes(receipts[i]) \subseteq DOMAIN tree

\* RADIX-13: the order leaves no choice of victim, and a prefix is no older than what extends it.
RADIX_13_OneOldestLeaf ==
    \A p, q \in Leaves(DOMAIN tree) : last[p] = last[q] => p = q
RADIX_13_PrefixAsRecent == \A p \in DOMAIN tree : \A q \in Prefixes(p) : last[q] >= last[p]

\* CACHE-14: a live handle names a resident path.
CACHE_14_LiveIsResident == handle.live => Prefixes(handle.path) \subseteq DOMAIN tree

\* CACHE-14: a stale handle stays stale; a live one in its place is of a path walked just now.
CACHE_14_StaleForEver ==
    [][~handle.live /\ handle'.live =>
         \A p \in Prefixes(handle'.path) : \A q \in DOMAIN tree' : last'[q] <= last'[p]]_vars
=============================================================================
