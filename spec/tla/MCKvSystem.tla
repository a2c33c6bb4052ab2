----------------------------- MODULE MCKvSystem -----------------------------
(* Bounds for KvSystem that a configuration cannot write, and the states     *)
(* that each Reach configuration must find, as invariants to break.          *)
EXTENDS KvSystem

\* Two pages in common, then each goes its own way.
TwoTexts         == [r |-> <<1, 2, 1, 1, 2, 1>>, s |-> <<1, 2, 1, 1, 1, 1>>]
TwoPromptLengths == [r |-> 5, s |-> 4]

\* CACHE-1: both requests hold a lock on one page.
NeverBothInOnePrefix ==
    \A r, s \in Running : Prefixes(lock[r]) \cap Prefixes(lock[s]) # {} => r = s

\* CACHE-3: a request has computed a page that the tree got from another one meanwhile.
NeverDuplicate ==
    \A r \in Running : \A i \in protected[r] + 1..WholeFor(fill[r]) * PageSize :
        PathAt(r, i) \notin DOMAIN tree

\* CACHE-2: a cached chunk ended within a page, which another request has cached since.
NeverMidPageCachedByOther ==
    \A r \in Running : prefix[r] > protected[r] => PathAt(r, prefix[r]) \notin DOMAIN tree

\* RADIX-11: a request is short and all that could go is locked.
NeverShortOfUnlocked ==
    \A r \in Running : Short(r) /\ DOMAIN tree # {} => \E p \in DOMAIN tree : ~IsLocked(p)
=============================================================================
