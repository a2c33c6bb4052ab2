---------------------------- MODULE SharedMemory ----------------------------
(* Segments that anybody may be killed over.  Clause ids refer to            *)
(* spec/shared_memory.md.  Each system call of create, attach, close and     *)
(* reap is a step, and between any two of them a process may be killed: its  *)
(* locks go, and a process of the same number starts again.                  *)
(*                                                                           *)
(*     a name goes under a lock that excludes all others, and no other way;  *)
(*     a lock is not converted: the shared one goes, then the other is asked *)
(*     for, and whoever does not get it at once goes on without it           *)
(*                                                                           *)
(* A name is given once (SHM-1), so a file and its name are one thing here,  *)
(* which is linked until it is removed.                                      *)
EXTENDS Naturals, FiniteSets

CONSTANTS Procs,    \* set of model values: who creates, attaches and closes, one handle each at a time
          Files,    \* set of model values: the segments that can ever be created
          Bug       \* which rule is broken, "none" of them to begin with

VARIABLES at,       \* [All -> STRING]: which step a process takes next
          file,     \* [All -> Files \cup {None}]: what it has open
          linked,   \* SUBSET Files: those whose name is there
          used,     \* SUBSET Files: those that were created
          ready,    \* SUBSET Files: those that are reserved and have their size
          shared,   \* [Files -> SUBSET All]: who has a shared lock
          alone,    \* [Files -> SUBSET All]: who has the lock that excludes all others
          todo,     \* SUBSET Files: what the reaper has listed and not yet looked at
          doomed,   \* SUBSET Files: dead when the reaper began, and opened by nobody else since
          killed    \* BOOLEAN: was anybody ever killed

vars == <<at, file, linked, used, ready, shared, alone, todo, doomed, killed>>
locks == <<shared, alone>>
files == <<linked, used, ready>>
sweep == <<todo, doomed>>

None   == 0
Reaper == 99
All    == Procs \cup {Reaper}

Others(p, f)    == (shared[f] \cup alone[f]) \ {p}
CanShare(p, f)  == alone[f] \subseteq {p}
CanExclude(p, f) == Others(p, f) = {}

Goes(p, step)    == at' = [at EXCEPT ![p] = step]
Opens(p, f)      == file' = [file EXCEPT ![p] = f] /\ doomed' = doomed \ {f}
Unlocked(p, l)   == [f \in Files |-> l[f] \ {p}]

\* It closes its descriptor, and has nothing open any more.
Leaves(p) ==
    /\ file' = [file EXCEPT ![p] = None]
    /\ shared' = Unlocked(p, shared)
    /\ alone' = Unlocked(p, alone)

TypeOK ==
    /\ at \in [All -> {"idle", "made", "locked", "looked", "holds", "opened", "probed", "sees",
                       "closing", "dropped", "removing", "done", "listed", "swept"}]
    /\ file \in [All -> Files \cup {None}]
    /\ linked \subseteq used /\ used \subseteq Files /\ ready \subseteq used
    /\ shared \in [Files -> SUBSET All] /\ alone \in [Files -> SUBSET All]
    /\ todo \subseteq Files /\ doomed \subseteq Files
    /\ killed \in BOOLEAN

Init ==
    /\ at = [p \in All |-> "idle"]
    /\ file = [p \in All |-> None]
    /\ linked = {} /\ used = {} /\ ready = {}
    /\ shared = [f \in Files |-> {}] /\ alone = [f \in Files |-> {}]
    /\ todo = {} /\ doomed = {}
    /\ killed = FALSE

-----------------------------------------------------------------------------
\* shm_open(O_CREAT | O_EXCL)
Make(p, f) ==
    /\ at[p] = "idle" /\ f \notin used
    /\ used' = used \cup {f} /\ linked' = linked \cup {f}
    /\ Opens(p, f) /\ Goes(p, "made")
    /\ UNCHANGED <<ready, locks, todo, killed>>

\* flock(LOCK_SH | LOCK_NB); who does not get it has lost the file to a remover.
LockNew(p) ==
    /\ at[p] = "made"
    /\ IF CanShare(p, file[p])
       THEN /\ shared' = [shared EXCEPT ![file[p]] = @ \cup {p}]
            /\ Goes(p, IF Bug = "creates without looking" THEN "looked" ELSE "locked")
            /\ UNCHANGED <<file, alone>>
       ELSE Leaves(p) /\ Goes(p, "idle")
    /\ UNCHANGED <<files, sweep, killed>>

LookNew(p) ==
    /\ at[p] = "locked"
    /\ IF file[p] \in linked
       THEN Goes(p, "looked") /\ UNCHANGED <<file, locks>>
       ELSE Leaves(p) /\ Goes(p, "idle")
    /\ UNCHANGED <<files, sweep, killed>>

\* posix_fallocate, all of it or nothing (SHM-3, SHM-5)
Reserve(p) ==
    /\ at[p] = "looked"
    /\ \/ ready' = ready \cup {file[p]} /\ Goes(p, "holds")
       \/ Goes(p, "closing") /\ UNCHANGED ready
    /\ UNCHANGED <<file, linked, used, locks, sweep, killed>>

-----------------------------------------------------------------------------
\* shm_open
Open(p, f) ==
    /\ at[p] = "idle" /\ f \in linked
    /\ Opens(p, f) /\ Goes(p, "opened")
    /\ UNCHANGED <<files, locks, todo, killed>>

\* flock(LOCK_EX | LOCK_NB): who gets it came too late, and removes what is dead (SHM-7).
Probe(p) ==
    /\ at[p] = "opened"
    /\ IF CanExclude(p, file[p])
       THEN alone' = [alone EXCEPT ![file[p]] = {p}] /\ Goes(p, "removing")
       ELSE Goes(p, "probed") /\ UNCHANGED alone
    /\ UNCHANGED <<file, files, shared, sweep, killed>>

LockOpened(p) ==
    /\ at[p] = "probed"
    /\ IF CanShare(p, file[p])
       THEN shared' = [shared EXCEPT ![file[p]] = @ \cup {p}] /\ Goes(p, "sees")
            /\ UNCHANGED <<file, alone>>
       ELSE Leaves(p) /\ Goes(p, "idle")
    /\ UNCHANGED <<files, sweep, killed>>

\* The name still leads there, and there is something of it to map.
LookOpened(p) ==
    /\ at[p] = "sees"
    /\ CASE file[p] \notin linked /\ Bug # "attaches without looking" ->
                Leaves(p) /\ Goes(p, "idle")
         [] file[p] \notin ready ->
                IF Bug = "refuses without closing"
                THEN Leaves(p) /\ Goes(p, "idle")
                ELSE Goes(p, "closing") /\ UNCHANGED <<file, locks>>
         [] OTHER -> Goes(p, "holds") /\ UNCHANGED <<file, locks>>
    /\ UNCHANGED <<files, sweep, killed>>

-----------------------------------------------------------------------------
\* flock(LOCK_EX | LOCK_NB) of a shared lock, in the two halves that the kernel makes of it
Drop(p) ==
    /\ at[p] \in {"holds", "closing"}
    /\ shared' = [shared EXCEPT ![file[p]] = @ \ {p}] /\ Goes(p, "dropped")
    /\ UNCHANGED <<file, files, alone, sweep, killed>>

AskToBeLast(p) ==
    /\ at[p] = "dropped"
    /\ IF CanExclude(p, file[p]) \/ Bug = "removes unasked"
       THEN alone' = [alone EXCEPT ![file[p]] = @ \cup {p}] /\ Goes(p, "removing")
            /\ UNCHANGED <<file, shared>>
       ELSE Leaves(p) /\ Goes(p, "idle")
    /\ UNCHANGED <<files, sweep, killed>>

\* shm_unlink, under the lock
Unlink(p) ==
    /\ at[p] = "removing"
    /\ linked' = linked \ {file[p]} /\ Goes(p, "done")
    /\ UNCHANGED <<file, used, ready, locks, sweep, killed>>

Close(p) ==
    /\ at[p] = "done"
    /\ Leaves(p) /\ Goes(p, IF p = Reaper THEN "listed" ELSE "idle")
    /\ UNCHANGED <<files, sweep, killed>>

-----------------------------------------------------------------------------
\* Dead: the name is there, and nobody has the file open.
Dead == { f \in linked : \A p \in All : file[p] # f }

List ==
    /\ at[Reaper] = "idle"
    /\ todo' = linked /\ doomed' = Dead /\ Goes(Reaper, "listed")
    /\ UNCHANGED <<file, files, locks, killed>>

OpenListed(f) ==
    /\ at[Reaper] = "listed" /\ f \in todo
    /\ todo' = todo \ {f}
    /\ IF f \in linked
       THEN file' = [file EXCEPT ![Reaper] = f] /\ Goes(Reaper, "opened")
       ELSE UNCHANGED <<at, file>>
    /\ UNCHANGED <<files, locks, doomed, killed>>

\* What the reaper takes for dead: nobody has a lock on it.  With a number for a life it never is,
\* because the number is in use again; with a number that is of another namespace it always is.
Reapable(f) ==
    CASE Bug = "takes a number for a life"   -> FALSE
      [] Bug = "takes no number for a death" -> TRUE
      [] OTHER                               -> CanExclude(Reaper, f)

Reap ==
    /\ at[Reaper] = "opened"
    /\ IF Reapable(file[Reaper])
       THEN alone' = [alone EXCEPT ![file[Reaper]] = @ \cup {Reaper}] /\ Goes(Reaper, "removing")
            /\ UNCHANGED <<file, shared>>
       ELSE Leaves(Reaper) /\ Goes(Reaper, "listed")
    /\ UNCHANGED <<files, sweep, killed>>

EndOfList ==
    /\ at[Reaper] = "listed" /\ todo = {}
    /\ Goes(Reaper, "swept")
    /\ UNCHANGED <<file, files, locks, sweep, killed>>

Return ==
    /\ at[Reaper] = "swept"
    /\ doomed' = {} /\ Goes(Reaper, "idle")
    /\ UNCHANGED <<file, files, locks, todo, killed>>

Kill(p) ==
    /\ at[p] # "idle"
    /\ Leaves(p) /\ Goes(p, "idle") /\ killed' = TRUE
    /\ IF p = Reaper THEN todo' = {} /\ doomed' = {} ELSE UNCHANGED sweep
    /\ UNCHANGED files

Next ==
    \/ \E p \in Procs :
        \/ \E f \in Files : Make(p, f) \/ Open(p, f)
        \/ LockNew(p) \/ LookNew(p) \/ Reserve(p)
        \/ Probe(p) \/ LockOpened(p) \/ LookOpened(p)
        \/ Drop(p) \/ AskToBeLast(p)
    \/ \E p \in All : Unlink(p) \/ Close(p) \/ Kill(p)
    \/ List \/ Reap \/ EndOfList \/ Return
    \/ \E f \in Files : OpenListed(f)

Spec == Init /\ [][Next]_vars

-----------------------------------------------------------------------------
\* A name leads to its segment for as long as somebody holds it; so nobody was given one that had
\* been removed (SHM-2, SHM-7), and who creates has the name that it returns.
SHM_14_HeldIsLinked == \A p \in Procs : at[p] = "holds" => file[p] \in linked

SHM_3_HeldIsReserved == \A p \in Procs : at[p] = "holds" => file[p] \in ready

\* The kernel's locks: whoever excludes all others is the only one.
SHM_13_RemoverIsAlone ==
    \A f \in Files : alone[f] # {} => Cardinality(alone[f] \cup shared[f]) = 1

\* Where nobody is ever killed, nothing is left to reap.
SHM_9_LastTakesTheName == ~killed /\ (\A p \in All : file[p] = None) => linked = {}

\* A sweep leaves nothing that was dead when it began, whoever was killed before.
SHM_21_NothingIsLeft == at[Reaper] = "swept" => doomed \cap linked = {}
=============================================================================
