--------------------------- MODULE MCSharedMemory ---------------------------
(* Bounds for SharedMemory stand in the configurations; here are the states  *)
(* that each Reach configuration must find, written as invariants to break.  *)
EXTENDS SharedMemory, TLC

\* Processes are alike, and so are files.
Symmetry == Permutations(Procs) \cup Permutations(Files)

\* SHM-2: a file was taken for dead before its creator had a lock on it.
NeverNewbornGone == \A p \in Procs : at[p] = "made" => file[p] \in linked

\* SHM-7: an attacher has its lock, and the name has gone between its probe and its lock.
NeverTooLate == \A p \in Procs : at[p] = "sees" => file[p] \in linked

\* SHM-9: two give up their shared lock at once, and neither has asked yet whether it was the last.
NeverTwoAtOnce ==
    \A p, q \in Procs : p # q /\ at[p] = "dropped" /\ at[q] = "dropped" => file[p] # file[q]

\* SHM-7, SHM-9: who attached to what its creator could not reserve is the last to have it.
NeverLeftIncomplete ==
    \A p \in Procs : at[p] = "removing" => file[p] \in ready \/ \E q \in Procs \ {p} : at[q] # "idle"

\* SHM-21: the dead are found.
NeverDoomed == doomed = {}
=============================================================================
