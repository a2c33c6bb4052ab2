--------------------------- MODULE OwnershipTrace ---------------------------
(* Ownership, made to follow a log (VALID-6).  kvspec.validate.model writes  *)
(* the module TraceData: the bounds and the steps, one or more an event.  A  *)
(* step has an action, a row, a place and pages, those that it does not need *)
(* being 0 or empty.  Pages are numbered anew, in order, without those that  *)
(* the log never names; <<a, b>> stands for a, a + 1, .. b - 1.              *)
(*                                                                           *)
(*   log                        steps                                        *)
(*   start                      what takes the empty pools to its state      *)
(*   alloc, _extend, _decode    Take, and Within for a page that was begun   *)
(*   free                       LetGo                                        *)
(*   restore_state              Undo                                         *)
(*   write                      Write, and Names for a page that was begun   *)
(*   alloc_rows, free_rows      TakeRow, LeaveRow                            *)
(*   insert                     AdoptSlots                                   *)
(*   cache_unfinished_req       Write, Names, AdoptRow, Give                 *)
(*   cache_finished_req         AdoptSlots, GiveRow                          *)
(*   evict, reset               Evict, and SeeTree of a tree that is empty;  *)
(*                              Drop, where a cache gives nothing back       *)
(*   observe                    SeeFree, SeePending, SeeRows, SeeTree        *)
(*                                                                           *)
(* The search goes as deep as the log can be followed.                       *)
EXTENDS Ownership, TraceData

VARIABLE at             \* Nat: the step to take next

Step   == Steps[at]
Runs   == Step.pages
InRuns(n) == \E i \in 1..Len(Runs) : Runs[i][1] <= n /\ n < Runs[i][2]
Listed == [i \in 1..Runs[1][2] - Runs[1][1] |-> Runs[1][1] + i - 1]
These  == IF Len(Runs) = 1 THEN Runs[1][1]..Runs[1][2] - 1 ELSE { p \in Pages : InRuns(p) }
Beyond == { i \in 1..Len(Runs) : Runs[i][1] < 1 \/ Runs[i][2] > PageCount + 1 }

\* LEDGER-10: no step names a page outside the pool, nor a row outside its own.
Is(action) ==
    /\ at <= Len(Steps) /\ Step.action = action
    /\ Step.row \in Rows /\ (action # "SeeRows" => Beyond = {})
    /\ at' = at + 1

Has(o)  == { p \in Pages : has[p] = o }
Changed == { p \in Pages : has'[p] # has[p] }

\* PAGE-8: an allocation goes on with a page that somebody has begun.
Within == Whose(These) \cap (Gone \cup {Tree}) = {}

\* CACHE-2, CACHE-5: from a place on the row names these: what the tree has there, or the page that
\* a write in the middle of it goes on with.
Names ==
    LET row  == rows[Step.row]
        last == Step.place + Len(Listed) - 1
    IN  Step.row \in live /\ last <= Len(row) /\ Listed = SubSeq(row, Step.place, last)

\* PAGE-14: what was handed out is free, whatever group is open.
Undo(S) ==
    /\ Whose(S) \cap (Gone \cup {Tree}) = {} /\ AtRest(S)
    /\ Now(S, Free)
    /\ UNCHANGED <<live, rows, copies, group>>

\* CACHE-15: a cache of somebody else drops its tree, and leaves it to its caller to clear the pool.
Drop == Now(Has(Tree), Abandoned) /\ UNCHANGED <<live, rows, copies, group>>

Changes ==
    \/ Is("Take") /\ Take(These)
    \/ Is("Give") /\ Give(These)
    \/ Is("LetGo") /\ LetGo(These)
    \/ Is("Undo") /\ Undo(These)
    \/ Is("Evict") /\ These \subseteq Has(Tree) /\ Give(These)
    \/ Is("OpenGroup") /\ OpenGroup
    \/ Is("CloseGroup") /\ CloseGroup
    \/ Is("Clear") /\ Clear
    \/ Is("TakeRow") /\ TakeRow(Step.row)
    \/ Is("GiveRow") /\ GiveRow(Step.row, These)
    \/ Is("LeaveRow") /\ LeaveRow(Step.row)
    \/ Is("ClearRows") /\ ClearRows
    \/ Is("Drop") /\ Drop
    \/ Is("Write") /\ Write(Step.row, Step.place, Listed)
    \/ Is("AdoptRow") /\ AdoptRow(Step.row, Step.place) /\ Changed = These
    \/ Is("AdoptSlots") /\ AdoptSlots(These)
    \/ Is("CopyBegin") /\ CopyBegin(Step.place, These)
    \/ Is("CopyEnd") /\ CopyEnd(Step.place)

Sees ==
    /\ \/ Is("Within") /\ Within
       \/ Is("Names") /\ Names
       \/ Is("SeeFree") /\ These = Has(Free)
       \/ Is("SeePending") /\ These = Has(Pending)
       \/ Is("SeeTree") /\ These = Has(Tree)
       \/ Is("SeeRows") /\ live = { r \in Rows : InRuns(r) }
    /\ UNCHANGED vars

TraceInit == Init /\ at = 1
Position  == at     \* a place in the log has one state
TraceSpec == TraceInit /\ [][Changes \/ Sees]_<<vars, at>>
=============================================================================
