-------------------------------- MODULE Trie --------------------------------
(* Paths of pages, and prefix-closed maps from paths, as the caches of this  *)
(* folder use them.  A path is a sequence with one symbol for each page.     *)
EXTENDS Naturals, Sequences, FiniteSets

Range(f) == { f[x] : x \in DOMAIN f }

\* The paths that p goes through, itself included, the root not.
Prefixes(p) == { SubSeq(p, 1, n) : n \in 1..Len(p) }

\* RADIX-1: how many pages of a key the map has.
FoundLength(map, key) ==
    CHOOSE n \in 0..Len(key) :
        /\ \A m \in 1..n : SubSeq(key, 1, m) \in DOMAIN map
        /\ n = Len(key) \/ SubSeq(key, 1, n + 1) \notin DOMAIN map

Found(map, key) == SubSeq(key, 1, FoundLength(map, key))

IsPrefixClosed(S) == \A p \in S : Prefixes(p) \subseteq S

\* The members of S that no other extends.
Leaves(S) == { p \in S : \A q \in S : p \in Prefixes(q) => p = q }

\* A map without the paths of S.
Without(map, S) == [p \in DOMAIN map \ S |-> map[p]]

\* A map that has also the paths of S, where those that are new get value(p).
With(map, S, value(_)) ==
    [p \in DOMAIN map \cup S |-> IF p \in DOMAIN map THEN map[p] ELSE value(p)]

\* The ranks of the values of a map, 0 the smallest.
Ranked(f) == [p \in DOMAIN f |-> Cardinality({ f[q] : q \in { r \in DOMAIN f : f[r] < f[p] } })]

\* RADIX-3: the paths of S become the most recent, all with one tick.
Touched(last, S) ==
    LET now == Cardinality(DOMAIN last)
    IN  Ranked([p \in DOMAIN last \cup S |-> IF p \in S THEN now ELSE last[p]])

\* A sequence without its i-th member.
RemoveAt(s, i) == SubSeq(s, 1, i - 1) \o SubSeq(s, i + 1, Len(s))

Largest(S) == CHOOSE x \in S : \A y \in S : y <= x

\* The n smallest members of a set of numbers, ascending.
RECURSIVE Smallest(_, _)
Smallest(S, n) ==
    IF n = 0 THEN <<>>
    ELSE LET least == CHOOSE x \in S : \A y \in S : x <= y
         IN  <<least>> \o Smallest(S \ {least}, n - 1)
=============================================================================
