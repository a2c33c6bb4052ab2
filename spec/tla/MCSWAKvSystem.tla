--------------------------- MODULE MCSWAKvSystem ---------------------------
(* Bounds for SWAKvSystem that a configuration cannot write, and the states  *)
(* that each Reach configuration must find, as invariants to break.          *)
(*                                                                           *)
(* SWAKvSystem.cfg has 5,576 distinct states, SWAKvSystemWindow3.cfg 5,196;  *)
(* the first with a window pool of 6, by hand, 9,065.                        *)
EXTENDS SWAKvSystem

\* For a window of two pages and of three: they part behind its first pages.
TwoTexts  == [r |-> <<"a", "b", "c", "d">>, s |-> <<"a", "b", "e">>]
LongTexts == [r |-> <<"a", "b", "c", "d", "e">>, s |-> <<"a", "b", "c", "f">>]

Beginning == { <<"a", "b">> }

Lawful ==
    /\ pools.held = Range(tree) \cup UNION { Own(r) : r \in Running }
    /\ \A r \in Running : Own(r) \cap Range(tree) = {}
    /\ CACHE_1_RowFollowsTree /\ CACHE_1_NoDanglingRow
    /\ SWA_1_EachPageOnce /\ SWA_2_PairsAreHeld
    /\ RADIX_5_OnePagePerPath /\ SWARADIX_8_LiveArePaired

HasPair(r) == [i \in DOMAIN row[r] |-> row[r][i] \in DOMAIN pools.pair]

\* While the law holds, all that a page has is its owner: states that differ in the names of pages
\* alone count as one.  Where it is broken nothing is left out.
View == IF Lawful
        THEN <<DOMAIN tree, dead, phase, fill, protected, behind, [r \in Requests |-> HasPair(r)]>>
        ELSE vars

\* SWARADIX-13: eviction took the pair of a page that is locked, before the window.
NeverTombstoneUnderLock == dead \cap Locked = {}

\* SWARADIX-1, CACHE-19: what is locked could not be found again.
NeverTombstoneUnderWindowLock == dead \cap WindowLocked = {}

\* SWARADIX-5: a request revives what another one has locked as soon as it is cached.
NeverRevivalUnderOthersLock ==
    \A r, s \in Running :
        Revived(tree, dead, pools, PathOf(r, fill[r]), row[r]) \cap Prefixes(lock[s]) # {} => r = s

\* SWARADIX-12: one page that goes takes two tombstones with it.
NeverCascadeOfTwo ==
    \A p \in Leaves(DOMAIN tree) \ Locked :
        Cardinality(DOMAIN tree) - Cardinality(Shrunk(DOMAIN tree, dead, p).paths) <= 2

\* SWARADIX-1: a request has to compute again what is resident.
NeverFallsBack ==
    \A r \in Requests : MatchLength(tree, dead, Text[r]) = FoundLength(tree, Text[r])

\* SWARADIX-4: a page that a request has left behind enters the tree without its pair.
NeverEntersAsTombstone == \A r \in Running : Cached(r).dead \subseteq dead

\* CACHE-19: a request has given a pair back, and another one holds the same path.
NeverLeftBehindOnSharedPath ==
    \A r, s \in Running : \A i \in protected[r] + 1..Len(row[r]) :
        row[r][i] \notin DOMAIN pools.pair /\ PathOf(r, i) \in Prefixes(lock[s]) => r = s

\* SWARADIX-3, CACHE-2: what a request has computed is not all within its reach.
NeverShortReach == \A r \in Running : Len(Cached(r).reach) = fill[r]

\* SWA-4: no page is left, of neither pool; or of the window pool alone.
NeverBothExhausted   == pools.free # {} \/ pools.windowFree # {}
NeverWindowExhausted == pools.windowFree = {} => pools.free = {}
=============================================================================
