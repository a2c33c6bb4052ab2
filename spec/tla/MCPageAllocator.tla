-------------------------- MODULE MCPageAllocator --------------------------
(* Bounds for PageAllocator stand in the configurations; here are the states *)
(* that each Reach configuration must find, written as invariants to break.  *)
EXTENDS PageAllocator

\* PAGE-11: everything waits in a group.
NeverAllPending == Len(pending) < PageCount

\* PAGE-16: after 3, 1 was handed out, which only a merge in between brings under NeedSort.
NeverMerged == IsAscending(since)

\* PAGE-14: a merge lies between the ticket and its restore, so the list is not sorted any more.
NeverRestoredAfterMerge == IsAscending(free)

\* PAGE-14: one ticket covers more than a single allocation can take.
NeverTwoAllocsUndoable == Len(since) <= MaxAlloc
=============================================================================
