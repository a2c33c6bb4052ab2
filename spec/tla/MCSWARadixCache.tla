-------------------------- MODULE MCSWARadixCache --------------------------
(* Bounds for SWARadixCache that a configuration cannot write, and the       *)
(* states that each Reach configuration must find, as invariants to break.   *)
(*                                                                           *)
(* SWARadixCache.cfg has 1,508 distinct states, SWARadixCacheWindow3.cfg     *)
(* 948; the first with 6 full and 5 window pages, by hand, 2,868.            *)
EXTENDS SWARadixCache

\* For a window of two pages and of three.
ThreeBranches == { <<"a", "b", "c">>, <<"a", "b", "d">>, <<"a", "e">> }
LongBranches  == { <<"a", "b", "c", "d">>, <<"a", "b", "c", "e">> }

Lawful ==
    /\ pools.held = Range(tree) /\ SWA_1_EachPageOnce /\ SWA_2_PairsAreHeld
    /\ RADIX_5_OnePagePerPath /\ RADIX_6_LocksAreReceipts
    /\ SWARADIX_8_LiveArePaired /\ SWARADIX_9_WindowLocksAreReceipts

\* While the law holds, all that a page has is its owner: states that differ in the names of pages
\* alone count as one.  Where it is broken nothing is left out.
View == IF Lawful THEN <<DOMAIN tree, dead, last, receipts>> ELSE vars

\* SWARADIX-9: a tombstone among the last pages of a path that is locked.
NeverTombstoneUnderWindowLock == \A p \in dead : windowLocks[p] = 0

\* SWARADIX-9: window locks that end at different pages share one.
NeverSharedWindowLock ==
    \A i, j \in DOMAIN receipts :
        WindowOf(receipts[i]) \cap WindowOf(receipts[j]) # {} => receipts[i] = receipts[j]

\* SWARADIX-1: a match falls back over a tombstone, and not to nothing.
NeverFallsBackWithin ==
    \A key \in Keys :
        MatchLength(tree, dead, key) \in {0, FoundLength(tree, key)}

\* SWARADIX-5: what is revived if the path is inserted again is under a lock.
NeverRevivableUnderLock == \A p \in dead : locks[p] > 0 => ~CanTake(pools, Len(p))

\* SWARADIX-14: the live page walked longest ago is under a window lock, so another one goes.
NeverOldestWindowLocked ==
    \A p \in DOMAIN tree \ dead :
        windowLocks[p] > 0 /\ Takeable # {} => \E q \in Takeable : IsBefore(q, p)
=============================================================================
