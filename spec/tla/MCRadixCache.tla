---------------------------- MODULE MCRadixCache ----------------------------
(* Bounds for RadixCache that a configuration cannot write, and the states   *)
(* that each Reach configuration must find, as invariants to break.          *)
EXTENDS RadixCache

\* The client keeps handles of one branch; for a graph that can be compared, without the root.
OneBranch == { Root, <<"a">>, <<"a", "b">> }
TwoPages  == { <<"a">>, <<"a", "b">> }

\* CACHE-11: two receipts share a page and end at different ones.
NeverSharedLock ==
    \A i, j \in 1..Len(receipts) :
        Prefixes(receipts[i]) \cap Prefixes(receipts[j]) # {} => receipts[i] = receipts[j]

\* RADIX-8: no page is left for an insert.
NeverFull == free # {}

\* CACHE-14: the handle is stale though its path is resident.
NeverStaleAndResident == handle.path \in DOMAIN tree => handle.live

\* RADIX-11: the leaf that was walked longest ago is locked, so another one goes.
NeverOldestLocked ==
    \A p \in Leaves(DOMAIN tree) :
        locks[p] > 0 /\ (\E q \in DOMAIN tree : locks[q] = 0)
            => \E q \in Leaves(DOMAIN tree) : last[q] < last[p]
=============================================================================
