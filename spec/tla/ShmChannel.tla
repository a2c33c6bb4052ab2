----------------------------- MODULE ShmChannel -----------------------------
(* A writer, readers, and a ring of blocks between them.  Clause ids refer   *)
(* to spec/shm_channel.md.  The law, of every reader r that counts:          *)
(*                                                                           *)
(*     written - BlockCount <= read[r] <= written                            *)
(*                                                                           *)
(* Steps are as small as others can see: a block is half-written before it   *)
(* is whole, whole before `written` counts it, and a message is read in two  *)
(* halves.  Who finds nothing to do announces that it will sleep, looks once *)
(* more, sleeps; a bell wakes it, or the end of its slice, after which it    *)
(* looks whether its peers live.  Every process may die between two steps.   *)
EXTENDS Naturals, FiniteSets

CONSTANTS BlockCount,   \* blocks of the ring
          MessageCount, \* messages that the writer sends before it closes
          Readers,      \* the readers, all attached
          Mortals,      \* SUBSET (Readers \cup {Writer}): who may die
          Slices,       \* BOOLEAN: does sleep end by itself, to look for deaths
          Bug           \* which rule is broken, "none" of them to begin with

VARIABLES pc,           \* [Processes -> where it stands]
          alive,        \* SUBSET Processes
          counted,      \* SUBSET Readers: not dropped
          written,      \* messages published
          read,         \* [Readers -> messages received]
          block,        \* [0..BlockCount - 1 -> message in it, Torn while half-written]
          half,         \* [Readers -> the half that was read of a message]
          sound,        \* [Readers -> BOOLEAN: has it received the right ones, whole]
          announced     \* SUBSET Processes: who would be woken by its bell

vars == <<pc, alive, counted, written, read, block, half, sound, announced>>

Writer == "writer"
Torn   == 0
Processes == Readers \cup {Writer}
Waits  == {"announce", "again", "fall", "asleep", "look", "check"}
Over   == {"done", "noticed"}

Index(n) == n % BlockCount
Go(p, where) == pc' = [pc EXCEPT ![p] = where]
At(p, where) == p \in alive /\ pc[p] = where
Lowest(S)  == CHOOSE n \in S : \A m \in S : n <= m
Highest(S) == CHOOSE n \in S : \A m \in S : n >= m
Dead == counted \ alive

\* CHAN-1: the slowest reader that counts keeps its block.
Slowest == LET all == { read[r] : r \in counted } IN
           IF Bug = "ignores the slowest" THEN Highest(all) ELSE Lowest(all)
HasRoom == counted # {} /\ written - Slowest < BlockCount
HasMessage(r) == read[r] < written
Closed == pc[Writer] \in {"closing", "done"}

Init ==
    /\ pc = [p \in Processes |-> "idle"]
    /\ alive = Processes
    /\ counted = Readers
    /\ written = 0
    /\ read = [r \in Readers |-> 0]
    /\ block = [i \in 0..BlockCount - 1 |-> Torn]
    /\ half = [r \in Readers |-> Torn]
    /\ sound = [r \in Readers |-> TRUE]
    /\ announced = {}

-----------------------------------------------------------------------------
(* The writer *)

Begin ==
    /\ At(Writer, "idle") \/ At(Writer, "check")
    /\ written < MessageCount /\ HasRoom
    /\ block' = [block EXCEPT ![Index(written)] = Torn]
    /\ Go(Writer, IF Bug = "publishes before the data" THEN "publish" ELSE "fill")
    /\ UNCHANGED <<alive, counted, written, read, half, sound, announced>>

Message == written + (IF pc[Writer] = "refill" THEN 0 ELSE 1)

Fill ==
    /\ At(Writer, "fill") \/ At(Writer, "refill")
    /\ block' = [block EXCEPT ![Index(Message - 1)] = Message]
    /\ Go(Writer, IF pc[Writer] = "refill" THEN "ring" ELSE "publish")
    /\ UNCHANGED <<alive, counted, written, read, half, sound, announced>>

\* CHAN-6, CHAN-13: the message is there from here on.
Publish ==
    /\ At(Writer, "publish")
    /\ written' = written + 1
    /\ Go(Writer, IF Bug = "publishes before the data" THEN "refill" ELSE "ring")
    /\ UNCHANGED <<alive, counted, read, block, half, sound, announced>>

Woken(S) == [p \in Processes |->
    IF p \in S /\ p \in announced /\ pc[p] = "asleep" THEN "check" ELSE pc[p]]

\* CHAN-27: the bell of the readers; who has announced itself wakes, or will not fall asleep.
RingReaders ==
    /\ At(Writer, "ring") \/ At(Writer, "closing")
    /\ pc' = [Woken(Readers) EXCEPT ![Writer] = IF pc[Writer] = "ring" THEN "idle" ELSE "done"]
    /\ announced' = announced \ Readers
    /\ UNCHANGED <<alive, counted, written, read, block, half, sound>>

\* CHAN-18
Close ==
    /\ At(Writer, "idle") /\ written = MessageCount
    /\ Go(Writer, "closing")
    /\ UNCHANGED <<alive, counted, written, read, block, half, sound, announced>>

\* CHAN-22: having noticed a death, the writer goes on without that reader, or not at all.
Drop(r) ==
    /\ At(Writer, "noticed") /\ r \in Dead
    /\ counted' = counted \ {r}
    /\ Go(Writer, IF counted' = {} THEN "done" ELSE "check")
    /\ UNCHANGED <<alive, written, read, block, half, sound, announced>>

-----------------------------------------------------------------------------
(* A reader *)

ReadHalf(r) ==
    /\ At(r, "idle") \/ At(r, "check")
    /\ HasMessage(r)
    /\ half' = [half EXCEPT ![r] = block[Index(read[r])]]
    /\ Go(r, "half")
    /\ UNCHANGED <<alive, counted, written, read, block, sound, announced>>

\* CHAN-9: what was read is the next message, and both of its halves.
ReadRest(r) ==
    /\ At(r, "half")
    /\ sound' = [sound EXCEPT ![r] = /\ @
                                     /\ half[r] = read[r] + 1
                                     /\ block[Index(read[r])] = read[r] + 1]
    /\ half' = [half EXCEPT ![r] = Torn]
    /\ Go(r, "advance")
    /\ UNCHANGED <<alive, counted, written, read, block, announced>>

Advance(r) ==
    /\ At(r, "advance")
    /\ read' = [read EXCEPT ![r] = @ + 1]
    /\ Go(r, "ring")
    /\ UNCHANGED <<alive, counted, written, block, half, sound, announced>>

RingWriter(r) ==
    /\ At(r, "ring")
    /\ pc' = [Woken({Writer}) EXCEPT ![r] = "idle"]
    /\ announced' = announced \ {Writer}
    /\ UNCHANGED <<alive, counted, written, read, block, half, sound>>

-----------------------------------------------------------------------------
(* Waiting, and death *)

Ready(p) == IF p = Writer THEN HasRoom ELSE HasMessage(p)
MayWait(p) == IF p = Writer THEN written < MessageCount ELSE TRUE

\* A wait begins, or goes on, with a look at who lives (CHAN-20, CHAN-21).
Wait(p) ==
    /\ At(p, "idle") \/ At(p, "check")
    /\ MayWait(p) /\ ~Ready(p)
    /\ Go(p, "look")
    /\ UNCHANGED <<alive, counted, written, read, block, half, sound, announced>>

\* What was sent counts, if the writer closed or died since: a reader looks again for a message.
Look(p) ==
    /\ At(p, "look")
    /\ LET blind == Bug = "never looks"
           bad == ~blind /\ IF p = Writer THEN Dead # {} ELSE Writer \notin alive
           late == p # Writer /\ HasMessage(p) /\ Bug # "loses what is left"
       IN Go(p, IF late THEN "check"
                ELSE IF p # Writer /\ Closed THEN "done"
                ELSE IF bad THEN "noticed"
                ELSE "announce")
    /\ UNCHANGED <<alive, counted, written, read, block, half, sound, announced>>

Announce(p) ==
    /\ At(p, "announce")
    /\ announced' = announced \cup {p}
    /\ Go(p, IF Bug = "sleeps on an old look" THEN "fall" ELSE "again")
    /\ UNCHANGED <<alive, counted, written, read, block, half, sound>>

Again(p) ==
    /\ At(p, "again")
    /\ Go(p, IF Ready(p) \/ (p # Writer /\ Closed) THEN "check" ELSE "fall")
    /\ UNCHANGED <<alive, counted, written, read, block, half, sound, announced>>

\* The kernel compares the bell: who was rung for meanwhile does not sleep.
Fall(p) ==
    /\ At(p, "fall")
    /\ Go(p, IF p \in announced \/ Bug = "sleeps on an old bell" THEN "asleep" ELSE "check")
    /\ UNCHANGED <<alive, counted, written, read, block, half, sound, announced>>

SliceEnds(p) ==
    /\ Slices /\ At(p, "asleep")
    /\ Go(p, "check")
    /\ UNCHANGED <<alive, counted, written, read, block, half, sound, announced>>

Die(p) ==
    /\ p \in Mortals \cap alive /\ pc[p] \notin Over
    /\ alive' = alive \ {p}
    /\ UNCHANGED <<pc, counted, written, read, block, half, sound, announced>>

-----------------------------------------------------------------------------

Step(p) ==
    \/ Wait(p) \/ Look(p) \/ Announce(p) \/ Again(p) \/ Fall(p) \/ SliceEnds(p)
    \/ p = Writer /\ (Begin \/ Fill \/ Publish \/ RingReaders \/ Close \/ \E r \in Readers : Drop(r))
    \/ p \in Readers /\ (ReadHalf(p) \/ ReadRest(p) \/ Advance(p) \/ RingWriter(p))

Next == \E p \in Processes : Step(p) \/ Die(p)

\* Who lives goes on; nobody has to die.
Spec == Init /\ [][Next]_vars /\ \A p \in Processes : WF_vars(Step(p))

TypeOK ==
    /\ alive \subseteq Processes
    /\ counted \subseteq Readers
    /\ written \in 0..MessageCount
    /\ read \in [Readers -> 0..MessageCount]
    /\ block \in [0..BlockCount - 1 -> 0..MessageCount]
    /\ announced \subseteq Processes

CHAN_1_NeverBehindTheRing ==
    \A r \in counted : read[r] <= written /\ written - read[r] <= BlockCount

\* CHAN-15: the block that is being written is nobody's to read.
CHAN_1_NothingOverwritten ==
    pc[Writer] \in {"fill", "publish"} => \A r \in counted : written - read[r] < BlockCount

CHAN_9_PrefixWithoutHoles == \A r \in counted : sound[r]

\* CHAN-14, CHAN-21: what is published is whole, whenever the writer dies.
CHAN_13_PublishedIsWhole ==
    \A r \in counted : \A n \in read[r]..written - 1 : block[Index(n)] = n + 1

CHAN_21_EndsWithEverything == \A r \in counted : pc[r] \in Over => read[r] = written

\* CHAN-20, CHAN-21: notice is given of what is true.
CHAN_20_NoticedIsDead ==
    /\ pc[Writer] = "noticed" => Dead # {}
    /\ \A r \in Readers : pc[r] = "noticed" => Writer \notin alive

CHAN_27_EveryWaitEnds ==
    \A p \in Processes : (pc[p] \in Waits) ~> (pc[p] \notin Waits \/ p \notin alive)

\* Nobody lost, nobody left behind: the living get to the end, or are told of a death.
CHAN_27_EveryoneFinishes == \A p \in Processes : <>(pc[p] \in Over \/ p \notin alive)
=============================================================================
