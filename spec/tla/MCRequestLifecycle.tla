------------------------- MODULE MCRequestLifecycle -------------------------
(* Bounds for RequestLifecycle that a configuration cannot write, and the    *)
(* states that each Reach configuration must find, as invariants to break.   *)
(*                                                                           *)
(* RequestLifecycle.cfg has 4,758 distinct states, Speculates 876; where     *)
(* nobody is given up, Finishes has 1,104, FinishesInSmallChunks 228 and     *)
(* FinishesSpeculating 374.                                                  *)
EXTENDS RequestLifecycle

\* Of the three two have two pages in common.
ThreeTexts         == [r |-> <<1, 2, 1, 1, 2, 1>>, s |-> <<1, 2, 1, 1, 1, 1>>,
                       t |-> <<2, 2, 2, 1, 1, 1>>]
ThreePromptLengths == [r |-> 3, s |-> 3, t |-> 4]

\* The same, and the third stays longer than the others.
LongerTexts         == ThreeTexts
LongerPromptLengths == [r |-> 3, s |-> 3, t |-> 1]

\* They have nothing in common, and the last would not fit alone.
FewTexts         == [r |-> <<1, 1, 1, 1, 1, 1>>, t |-> <<2, 2, 2, 2>>,
                     long |-> <<3, 3, 3, 3, 3, 3, 3, 3>>]
FewPromptLengths == [r |-> 3, t |-> 3, long |-> 3]

\* They have two pages in common, and the last would fit but for what is speculated.
SpeculatedTexts         == [r |-> <<1, 2, 1, 1, 2, 1>>, s |-> <<1, 2, 1, 1, 1, 1>>,
                            long |-> <<3, 3, 3, 3, 3, 3, 3, 3, 3>>]
SpeculatedPromptLengths == [r |-> 3, s |-> 3, long |-> 5]

Everyone == Requests
Nobody   == {}

Lawful ==
    /\ CACHE_1_OneOwner /\ CACHE_1_RowFollowsTree /\ CACHE_1_NoDanglingRow
    /\ REQ_1_RowsOnce /\ SCHED_8_NothingLeftBehind
    /\ \A i \in DOMAIN steps : \A r \in DOMAIN steps[i].pages :
         /\ Len(steps[i].pages[r]) <= Len(row[r])
         /\ steps[i].pages[r] = SubSeq(row[r], 1, Len(steps[i].pages[r]))

\* While the law holds, all that a page has is its owner: states that differ in the names of pages
\* and rows alone count as one.  Where it is broken nothing is left out.
View ==
    IF Lawful
    THEN <<DOMAIN tree, phase, reason, [r \in Requests |-> Len(row[r])], lengths,
           [i \in DOMAIN steps |-> [steps[i] EXCEPT !.pages = [r \in DOMAIN @ |-> Len(@[r])]]]>>
    ELSE vars

-----------------------------------------------------------------------------
PagesBeyond(r) == PagesFor(Len(row[r])) - PagesFor(committed[r])

\* SCHED-16: of two who run one is retracted, while a third is between its chunks.
NeverRetractsWhileChunked ==
    \A r \in In("running") : CanRetract(r) => In("chunked") = {}

\* SCHED-16: one runs, is short, and only who is in its prefill can go.
NeverRetractsOnlyTheChunked ==
    \A r \in In("chunked") : CanRetract(r) => \E s \in In("running") : CanRetract(s)

\* SCHED-16: of three who run two have to go, one after the other.
NeverRetractsTwo ==
    \A r \in In("running") : CanRetract(r) => \A s \in In("waiting") : sampled[s] = 0

\* SCHED-17: who was retracted finds a page in the tree that only its own outputs can have made.
NeverResumesFromItsOutputs ==
    \A r \in In("waiting") : sampled[r] > 0 => Len(Match(r)) * PageSize <= PromptLength[r]

\* SCHED-22: its text has ended, the next step has it nevertheless, and a page for its extra token.
NeverLeavingHasExtraPage ==
    \A r \in In("leaving") : reason[r] = "done" /\ IsNamed(r) => PagesBeyond(r) = 0

\* SCHED-22: a step is in flight that names nobody but who is leaving.
NeverComputesForNobody ==
    \A i \in DOMAIN steps : \E r \in DOMAIN steps[i].pages : phase[r] # "leaving"

\* SCHED-19: a request is between its chunks, within a page, and may be given up.
NeverChunkedMidPage ==
    \A r \in In("chunked") : IsNamed(r) \/ committed[r] % PageSize = 0

\* SCHED-19: a request was given up while two steps that name it are in flight.
NeverAbortedInTwoSteps ==
    \A r \in In("leaving") : reason[r] = "aborted" => Cardinality(StepsOf(r)) < 2

\* SCHED-19: a request was given up while its chunk is in flight.
NeverAbortedInPrefill ==
    \A i \in DOMAIN steps : steps[i].kind = "prefill" => \A r \in In("leaving") : i \notin StepsOf(r)

\* CACHE-4: pages that nothing was ever committed to go back at release.
NeverReleasesOverAllocated ==
    \A r \in Requests : IsReleasable(r) => PagesBeyond(r) = 0

\* CACHE-3: who leaves has computed what the tree has, while a step is in flight.
NeverReleasesDuplicateInFlight ==
    \A r \in Requests : IsReleasable(r) /\ steps # <<>> => Duplicates(tree, r, committed[r]) = {}

\* CACHE-3: who is retracted has computed what another one has locked.
NeverRetractsDuplicate ==
    \A r \in Requests : CanRetract(r) => Duplicates(Without(tree, Unlocked), r, committed[r]) = {}

\* SCHED-11: there is a page for a first chunk, but those who run need it next.
NeverWaitsForRoom ==
    \A r \in In("waiting") :
        LET have == Cardinality(free) + Cardinality(Unlocked \ Prefixes(Match(r)))
        IN  Settled /\ In("chunked") = {} /\ have > 0 => DecodeNeed < have
=============================================================================
