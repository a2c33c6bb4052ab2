----------------------------- MODULE Ownership -----------------------------
(* Who may own a page, and what a system that works may do about it.  Clause *)
(* ids refer to spec/ownership_ledger.md.  The law:                          *)
(*                                                                           *)
(*     |free| + |pending| + |reserved| + |requests'| + |tree's| = PageCount  *)
(*                                                                           *)
(*     a row names the tree's pages and its request's own, and nothing else, *)
(*     except that a request may be given up by hand, in two halves          *)
(*                                                                           *)
(* What the ledger calls a fault is no action here.  A copy in flight lies   *)
(* over whoever has its pages: it changes what may be done, not whose it is. *)
EXTENDS Naturals, Sequences, FiniteSets

CONSTANTS PageCount,    \* the pages are 1 .. PageCount; page 0 is the sink
          RowCount,     \* the rows are 0 .. RowCount - 1
          RowLength,    \* pages that a row can name
          CopyNumbers,  \* set of Nat: the copies that can be in flight
          ByHand,       \* BOOLEAN: may somebody give a request up, pages and row, in either order
          Bug           \* which rule is broken, "none" of them to begin with

VARIABLES has,          \* [Pages -> Owners]: who has a page, copies aside
          live,         \* SUBSET Rows
          rows,         \* [Rows -> Seq(Pages)]: of each page-sized stretch the page
          copies,       \* [CopyNumbers -> SUBSET Pages]: what is in flight
          group         \* BOOLEAN: is a free group open

vars == <<has, live, rows, copies, group>>

Pages == 1..PageCount
Rows  == 0..RowCount - 1
Range(s) == { s[i] : i \in 1..Len(s) }
IsOnce(s) == Cardinality(Range(s)) = Len(s)

Free       == <<"free">>
Pending    == <<"pending">>
Reserved   == <<"reserved">>
Tree       == <<"tree">>
Request(r) == <<"request", r>>
Abandoned  == <<"abandoned">>   \* a request's whose row was given back
Owners     == {Free, Pending, Reserved, Tree, Abandoned} \cup { Request(r) : r \in Rows }

Own(r)    == { p \in Pages : has[p] = Request(r) }
Whose(S)  == { has[p] : p \in S }
Namers(S) == { r \in live : \E i \in 1..Len(rows[r]) : rows[r][i] \in S }
Copied    == UNION { copies[c] : c \in CopyNumbers }
Gone      == {Free, Pending}
GivenTo   == IF group THEN Pending ELSE Free

\* The pages of S have the owner o from here on.
Now(S, o) == has' = [p \in Pages |-> IF p \in S THEN o ELSE has[p]]

\* LEDGER-9: what a copy is of is nobody's to give or to take, until it is done.
AtRest(S) == S \cap Copied = {} \/ Bug = "gives during copy"

TypeOK ==
    /\ has \in [Pages -> Owners]
    /\ live \subseteq Rows
    /\ rows \in [Rows -> Seq(Pages)]
    /\ copies \in [CopyNumbers -> SUBSET Pages]
    /\ group \in BOOLEAN

Init ==
    /\ has = [p \in Pages |-> Free]
    /\ live = {}
    /\ rows = [r \in Rows |-> <<>>]
    /\ copies = [c \in CopyNumbers |-> {}]
    /\ group = FALSE

-----------------------------------------------------------------------------
\* LEDGER-2: what nobody has, and no row names any more, is handed out.
Take(S) ==
    /\ S # {}
    /\ \/ Namers(S) = {} /\ Whose(S) = {Free}
       \/ Bug = "takes from the tree" /\ Whose(S) = {Tree}
    /\ Now(S, Reserved)
    /\ UNCHANGED <<live, rows, copies, group>>

\* LEDGER-3, LEDGER-6: what somebody has is given back, and no row goes on naming it.
Give(S) ==
    /\ S # {} /\ AtRest(S)
    /\ Whose(S) \cap Gone = {}
    /\ Namers(S) = {} \/ Bug = "gives what is shared"
    /\ Now(S, GivenTo)
    /\ UNCHANGED <<live, rows, copies, group>>

\* CACHE-5, LEDGER-6: who gives a request up by hand gives its pages back, which its row may name
\* as long as nobody uses the one or the other.
LetGo(S) ==
    /\ ByHand /\ S # {} /\ AtRest(S)
    /\ Whose(S) \cap (Gone \cup {Tree}) = {}
    /\ Now(S, GivenTo)
    /\ UNCHANGED <<live, rows, copies, group>>

\* CACHE-5, LEDGER-7: and the row, before or after: what its request still has is abandoned.
LeaveRow(r) ==
    /\ ByHand /\ r \in live
    /\ live' = live \ {r}
    /\ rows' = [rows EXCEPT ![r] = <<>>]
    /\ Now(Own(r), Abandoned)
    /\ UNCHANGED <<copies, group>>

\* LEDGER-3: what is given back from here on is pending.
OpenGroup == ~group /\ group' = TRUE /\ UNCHANGED <<has, live, rows, copies>>

\* LEDGER-8: what is pending is free.
CloseGroup ==
    /\ group
    /\ group' = FALSE
    /\ Now({ p \in Pages : has[p] = Pending }, Free)
    /\ UNCHANGED <<live, rows, copies>>

\* LEDGER-8: everything is free, once no request, no tree and no copy has any of it.
Clear ==
    /\ Copied = {}
    /\ Whose(Pages) \subseteq Gone \cup {Reserved, Abandoned}
    /\ Now(Pages, Free)
    /\ group' = FALSE
    /\ UNCHANGED <<live, rows, copies>>

\* LEDGER-11: a free row is live, and names nothing.
TakeRow(r) ==
    /\ r \in Rows \ live
    /\ live' = live \cup {r}
    /\ UNCHANGED <<has, rows, copies, group>>

\* LEDGER-7: a row is given back, and with it all that is its request's.
GiveRow(r, S) ==
    /\ r \in live /\ AtRest(S)
    /\ S = Own(r) \/ (Bug = "finishes by halves" /\ S \subseteq Own(r))
    /\ Now(S, GivenTo)
    /\ live' = live \ {r}
    /\ rows' = [rows EXCEPT ![r] = <<>>]
    /\ UNCHANGED <<copies, group>>

\* LEDGER-8: every row is free; what their requests had is abandoned.
ClearRows ==
    /\ live' = {}
    /\ rows' = [r \in Rows |-> <<>>]
    /\ Now(UNION { Own(r) : r \in Rows }, Abandoned)
    /\ UNCHANGED <<copies, group>>

\* LEDGER-4: from stretch i on a row names s: what is reserved, which is its request's from here
\* on, its request's own, and the tree's.
Write(r, i, s) ==
    LET row == rows[r]
        end == i + Len(s) - 1
        new == Range(s)
        At(k) == IF k \in i..end THEN s[k - i + 1] ELSE row[k]
        names == [k \in 1..(IF end > Len(row) THEN end ELSE Len(row)) |-> At(k)]
    IN  /\ r \in live
        /\ s # <<>> /\ i \in 1..Len(row) + 1 /\ Len(names) <= RowLength
        /\ Cardinality(new) = Len(s) /\ IsOnce(names)
        /\ Whose(new) \subseteq {Reserved, Request(r), Tree}
        /\ rows' = [rows EXCEPT ![r] = names]
        /\ Now({ p \in new : has[p] = Reserved }, Request(r))
        /\ UNCHANGED <<live, copies, group>>

\* LEDGER-5: the tree has what was the request's of the first n pages of a row; LEDGER-9: not
\* while a copy of it is in flight.
AdoptRow(r, n) ==
    LET part == Range(SubSeq(rows[r], 1, n))
        S    == { p \in part : has[p] = Request(r) }
    IN  /\ r \in live
        /\ n \in 1..Len(rows[r]) /\ Cardinality(part) = n
        /\ Whose(part) \cap Gone = {} /\ AtRest(S)
        /\ Now(S, Tree)
        /\ UNCHANGED <<live, rows, copies, group>>

\* LEDGER-5: the tree has pages that were reserved or a request's, there or not.
AdoptSlots(S) ==
    /\ S # {} /\ AtRest(S)
    /\ Whose(S) \cap (Gone \cup {Tree}) = {}
    /\ Now(S, Tree)
    /\ UNCHANGED <<live, rows, copies, group>>

\* LEDGER-9: a copy from or to pages that somebody has is in flight.
CopyBegin(c, S) ==
    /\ copies[c] = {} /\ S # {}
    /\ Whose(S) \cap Gone = {}
    /\ copies' = [copies EXCEPT ![c] = S]
    /\ UNCHANGED <<has, live, rows, group>>

\* LEDGER-9: it is done, and the pages are whose they were.
CopyEnd(c) ==
    /\ copies[c] # {}
    /\ copies' = [copies EXCEPT ![c] = {}]
    /\ UNCHANGED <<has, live, rows, group>>

Next ==
    \/ \E S \in SUBSET Pages :
        \/ Take(S) \/ Give(S) \/ LetGo(S) \/ AdoptSlots(S)
        \/ \E r \in Rows : GiveRow(r, S)
        \/ \E c \in CopyNumbers : CopyBegin(c, S)
    \/ OpenGroup \/ CloseGroup \/ Clear \/ ClearRows
    \/ \E r \in Rows :
        \/ TakeRow(r) \/ LeaveRow(r)
        \/ \E i \in 1..RowLength : AdoptRow(r, i)
        \/ \E i \in 1..RowLength, p \in Pages : Write(r, i, <<p>>)
    \/ \E c \in CopyNumbers : CopyEnd(c)

Spec == Init /\ [][Next]_vars

-----------------------------------------------------------------------------
\* LEDGER-1: every page has one owner.
LEDGER_1_OneOwner == \A p \in Pages : Cardinality({ o \in Owners : has[p] = o }) = 1

\* LEDGER-3, LEDGER-8: nothing is pending outside a group.
LEDGER_3_PendingOnlyInGroup == ~group => \A p \in Pages : has[p] # Pending

\* LEDGER-4: a page of a request is named by no row but its own.
LEDGER_4_NoAlias ==
    \A r \in live, p \in Pages : \A q \in live \ {r} :
        has[p] = Request(r) => p \notin Range(rows[q])

\* LEDGER-6: no live row names a page that is somebody else's, nor one that is free or pending, but
\* for what was given back by hand.
LEDGER_6_NoDanglingRow ==
    \A r \in live : \A p \in Range(rows[r]) :
        has[p] \in {Request(r), Tree} \cup (IF ByHand THEN Gone ELSE {})

\* LEDGER-7: no page of a row that was given back is still its request's; it is abandoned, by hand.
LEDGER_7_NoLeak == UNION { Own(r) : r \in Rows \ live } = {}

\* LEDGER-9: what a copy is of somebody has, and it neither comes to the tree nor leaves it.
LEDGER_9_CopyOfWhatIsHeld == \A p \in Copied : has[p] \notin Gone
LEDGER_9_TreeKeepsWhatIsCopied ==
    [][\A p \in Copied \cap Copied' : (has[p] = Tree) <=> (has'[p] = Tree)]_vars

\* LEDGER-11: a row that is free names nothing.
LEDGER_11_FreeRowsNameNothing == \A r \in Rows \ live : rows[r] = <<>>

\* LEDGER-2, LEDGER-3: what is taken was free, and nothing is taken from anybody.
P == INSTANCE Pool WITH free  <- { p \in Pages : has[p] = Free },
                        taken <- { p \in Pages : has[p] # Free }
RefinesPool == P!Spec
=============================================================================
