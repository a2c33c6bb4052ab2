--------------------------- MODULE PageAllocator ---------------------------
(* The page allocator.  Clause ids refer to spec/page_allocator.md.  Pages   *)
(* are whole here: what happens within one (PAGE-5 to PAGE-8) is not state   *)
(* of the allocator.  The law:                                               *)
(*                                                                           *)
(*     |free| + |release| + |pending| + |held| = PageCount                   *)
(*                                                                           *)
(* The client keeps one ticket; to begin with, one that is worth nothing.    *)
EXTENDS Naturals, Sequences, FiniteSets

CONSTANTS PageCount,    \* the pages are 1 .. PageCount; page 0 is the sink
          NeedSort,     \* BOOLEAN: do freed pages wait in the release list
          MaxAlloc      \* largest single allocation, in pages

VARIABLES free,         \* Seq(Pages): the free list, the head is handed out first
          release,      \* Seq(Pages): the release list, empty unless NeedSort
          pending,      \* Seq(Pages): given back inside the open free group
          held,         \* SUBSET Pages: handed out and not given back
          group,        \* BOOLEAN: is a free group open
          ticket,       \* BOOLEAN: can the client's ticket still be restored
          since         \* Seq(Pages): handed out since that ticket, in order

vars == <<free, release, pending, held, group, ticket, since>>

Pages == 1..PageCount
Range(s) == { s[i] : i \in 1..Len(s) }
IsAscending(s) == \A i, j \in 1..Len(s) : i < j => s[i] < s[j]
Ascending(S) == CHOOSE s \in [1..Cardinality(S) -> S] : IsAscending(s)

TypeOK ==
    /\ free \in Seq(Pages) /\ release \in Seq(Pages) /\ pending \in Seq(Pages)
    /\ held \subseteq Pages
    /\ group \in BOOLEAN /\ ticket \in BOOLEAN
    /\ since \in Seq(Pages)

Init ==
    /\ free = Ascending(Pages)
    /\ release = <<>> /\ pending = <<>> /\ since = <<>>
    /\ held = {}
    /\ group = FALSE /\ ticket = FALSE

-----------------------------------------------------------------------------
\* PAGE-3, PAGE-16: n pages from the head of the free list, which the release list joins, sorted,
\* if it is too short alone.
Take(n) ==
    LET short == n > Len(free)
        from  == IF short THEN Ascending(Range(free) \cup Range(release)) ELSE free
        got   == SubSeq(from, 1, n)
    IN  /\ n <= Len(free) + Len(release)
        /\ free' = SubSeq(from, n + 1, Len(from))
        /\ release' = IF short THEN <<>> ELSE release
        /\ held' = held \cup Range(got)
        /\ since' = IF ticket THEN since \o got ELSE since
        /\ UNCHANGED <<pending, group, ticket>>

\* PAGE-15: from here on the ticket is worth nothing.
VoidTicket == ticket' = FALSE /\ since' = <<>>

\* PAGE-3: whole pages.
Alloc(n) == n > 0 /\ Take(n)

\* PAGE-6: requests extended by tokens that begin n pages.
AllocExtend(n) == n > 0 /\ Take(n)

\* PAGE-7: n requests decode a token each that begins a page.
AllocDecode(n) == n > 0 /\ Take(n)

\* PAGE-6, PAGE-7: tokens that fit into pages already held take none.
AllocWithin == held # {} /\ UNCHANGED vars

\* PAGE-4: a refused allocation changes nothing.
AllocRefused(n) == n > Len(free) + Len(release) /\ UNCHANGED vars

\* PAGE-9, PAGE-16: the pages named and no others, ascending, before the list that takes them.
Free(S) ==
    /\ S # {} /\ S \subseteq held
    /\ held' = held \ S
    /\ IF group
         THEN pending' = pending \o Ascending(S) /\ UNCHANGED <<free, release>>
         ELSE IF NeedSort
           THEN release' = Ascending(S) \o release /\ UNCHANGED <<free, pending>>
           ELSE free' = Ascending(S) \o free /\ UNCHANGED <<release, pending>>
    /\ VoidTicket
    /\ UNCHANGED group

\* PAGE-10: one page that is not held spoils the call: the sink, a free one, one out of range.
FreeRefused(p) == p \notin held /\ UNCHANGED vars

\* PAGE-11: what is given back from here on waits.
GroupBegin ==
    /\ ~group
    /\ group' = TRUE
    /\ VoidTicket
    /\ UNCHANGED <<free, release, pending, held>>

\* PAGE-11: all that waited becomes available as by one free.
GroupEnd ==
    /\ group
    /\ group' = FALSE
    /\ pending' = <<>>
    /\ IF NeedSort
         THEN release' = Ascending(Range(pending)) \o release /\ UNCHANGED free
         ELSE free' = Ascending(Range(pending)) \o free /\ UNCHANGED release
    /\ VoidTicket
    /\ UNCHANGED held

\* PAGE-12: a begin inside a group, or an end outside one, changes nothing.
BeginRefused == group /\ UNCHANGED vars
EndRefused   == ~group /\ UNCHANGED vars

\* PAGE-13: everything is free again, in ascending order.
Clear ==
    /\ free' = Ascending(Pages)
    /\ release' = <<>> /\ pending' = <<>>
    /\ held' = {}
    /\ group' = FALSE
    /\ VoidTicket

\* PAGE-14: from here on, what is handed out is remembered.
Backup == ticket' = TRUE /\ since' = <<>> /\ UNCHANGED <<free, release, pending, held, group>>

\* PAGE-14: what was handed out returns to the head; the rest stays, merged or not.
Restore ==
    /\ ticket
    /\ free' = since \o free
    /\ held' = held \ Range(since)
    /\ VoidTicket
    /\ UNCHANGED <<release, pending, group>>

\* PAGE-15: a ticket from before a free, a clear, a group call or a restore.
RestoreRefused == ~ticket /\ UNCHANGED vars

Next ==
    \/ \E n \in 1..MaxAlloc : Alloc(n) \/ AllocExtend(n) \/ AllocDecode(n)
    \/ AllocWithin
    \/ \E n \in 1..MaxAlloc : AllocRefused(n)
    \/ \E S \in SUBSET Pages : Free(S)
    \/ \E p \in 0..PageCount + 1 : FreeRefused(p)
    \/ GroupBegin \/ GroupEnd \/ BeginRefused \/ EndRefused
    \/ Clear
    \/ Backup \/ Restore \/ RestoreRefused

Spec == Init /\ [][Next]_vars /\ WF_vars(GroupEnd)

-----------------------------------------------------------------------------
\* PAGE-1: every page is in exactly one of the four places, once.
PAGE_1_Conservation ==
    /\ Len(free) + Len(release) + Len(pending) + Cardinality(held) = PageCount
    /\ Range(free) \cup Range(release) \cup Range(pending) \cup held = Pages

\* PAGE-2: the sink is in none of them.
PAGE_2_NoSink == 0 \notin Range(free) \cup Range(release) \cup Range(pending) \cup held

\* PAGE-11: nothing waits outside a group.
PAGE_11_PendingOnlyInGroup == ~group => pending = <<>>

\* PAGE-14: what a valid ticket would give back is still held, and named once.
PAGE_14_TicketIsHeld ==
    /\ Range(since) \subseteq held
    /\ Cardinality(Range(since)) = Len(since)

\* PAGE-15: a worthless ticket remembers nothing.
PAGE_15_VoidTicketIsEmpty == ~ticket => since = <<>>

\* PAGE-16: without NeedSort nothing waits to be sorted.
PAGE_16_ReleaseOnlyToSort == ~NeedSort => release = <<>>

\* PAGE-11 (liveness): what waits becomes available.
PAGE_11_PendingDrains == (pending # <<>>) ~> (pending = <<>>)

\* PAGE-4, PAGE-11: what cannot be had is taken, and no step takes a page from anybody.
P == INSTANCE Pool WITH free  <- Range(free) \cup Range(release),
                        taken <- held \cup Range(pending)
RefinesPool == P!Spec
=============================================================================
