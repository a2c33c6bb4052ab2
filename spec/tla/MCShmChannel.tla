---------------------------- MODULE MCShmChannel ----------------------------
(* Bounds for ShmChannel stand in the configurations; here are the states    *)
(* that each Reach configuration must find, written as invariants to break.  *)
EXTENDS ShmChannel

\* CHAN-7, CHAN-20: the writer sleeps for a reader that has died meanwhile.
NeverSleepsForTheDead == ~(At(Writer, "asleep") /\ Dead # {})

\* CHAN-22: after a reader's death the writer goes on, and another receives everything.
NeverGoesOnWithoutAReader == ~(written = MessageCount /\ counted # Readers /\ counted # {})

\* CHAN-21: the writer died with a block half-written, and a reader has received the rest.
NeverDiesHalfway ==
    ~(Writer \notin alive /\ pc[Writer] = "fill" /\ written > 0 /\ \A r \in Readers : pc[r] = "noticed")

\* CHAN-27: the bell rang between the last look and the sleep.
NeverRungBeforeSleep == \A p \in Processes : ~(At(p, "fall") /\ p \notin announced)

\* CHAN-9: one reader reads the first message in a full ring while the other has everything.
NeverFarApart ==
    \A r, s \in Readers : ~(pc[r] = "half" /\ written - read[r] = BlockCount /\ read[s] = written)
=============================================================================
