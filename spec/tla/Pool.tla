-------------------------------- MODULE Pool --------------------------------
(* What every allocator is, seen from far enough away: pages that can be    *)
(* had and pages that cannot.  PageAllocator refines it.                     *)

CONSTANT Pages      \* the pages of the pool

VARIABLES free,     \* SUBSET Pages: can be handed out now
          taken     \* SUBSET Pages: handed out, or given back and not yet available

Init == free = Pages /\ taken = {}

Take(S) == S \subseteq free  /\ free' = free \ S    /\ taken' = taken \cup S
Give(S) == S \subseteq taken /\ free' = free \cup S /\ taken' = taken \ S

Next == \E S \in SUBSET Pages : Take(S) \/ Give(S)

Spec == Init /\ [][Next]_<<free, taken>>
=============================================================================
