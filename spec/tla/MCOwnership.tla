---------------------------- MODULE MCOwnership ----------------------------
(* Bounds for Ownership stand in the configurations; here are the states     *)
(* that each Reach configuration must find, written as invariants to break.  *)
EXTENDS Ownership

\* LEDGER-4, LEDGER-9: two rows name a page of the tree that is in flight, one of them in the place
\* of a page that its request still has.
NeverReplacedByShared ==
    \A r, s \in live :
        /\ Range(rows[r]) \cap Range(rows[s]) \cap Copied # {}
        /\ Own(r) \ Range(rows[r]) # {}
        => r = s

\* LEDGER-3, CACHE-5: what a request has given back by hand is pending, and its row names it.
NeverPendingByHand == Namers({ p \in Pages : has[p] = Pending }) = {}
=============================================================================
