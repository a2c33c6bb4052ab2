-------------------------- MODULE RequestLifecycle --------------------------
(* The life of requests in a scheduler: to reject, abort or retract one, in  *)
(* whatever state it is, leaves no page, row or lock behind, and everyone    *)
(* is finished some day.  What the pools and the cache do at a call is in    *)
(* KvSystem; here is when they are called.                                   *)
(*                                                                           *)
(*   new --> waiting --> chunked --> running --> leaving --> finished        *)
(*    |         ^           |           |                         ^          *)
(*    |         +-----------+-----------+                         |          *)
(*    |              retracted: its outputs stay with it          |          *)
(*    +-----------------------------------------------------------+          *)
(*                   rejected: it could never run                            *)
(*                                                                           *)
(*   row:   [0 .... protected)     [protected ...... committed ... allocated)*)
(*   owner: the tree, by the lock  the request                               *)
(*                                                                           *)
(* A step is launched and settled later; between the two it reads and writes *)
(* the pages that its snapshot names.  One decode step may be launched       *)
(* before the one before is settled.  All else waits until none is in        *)
(* flight.  When a request meets its end of text, which one is admitted,     *)
(* which leaf is evicted and who is retracted, but for one, is left open.    *)
EXTENDS Trie

CONSTANTS PageCount,    \* the pages are 1 .. PageCount
          PageSize,     \* tokens in a page
          RowCount,     \* rows of the request pool
          Text,         \* [requests -> Seq(tokens)]: prompt, then what will be sampled at most
          PromptLength, \* [requests -> Nat]
          Budgets,      \* set of Nat: how many tokens of a prompt one chunk may bring
          SpecTokens,   \* Nat: slots of a decode step beyond the first; 0 is no speculation
          Abortable,    \* SUBSET requests: who may be given up
          Bug           \* which rule is broken, "none" of them to begin with

VARIABLES free,         \* SUBSET Pages
          tree,         \* [resident paths -> Pages]; a symbol of a path is a page of tokens
          freeRows,     \* SUBSET Rows
          phase,        \* [requests -> Phases]
          reason,       \* [requests -> Reasons]: why it leaves or has left, "none" until then
          index,        \* [requests -> row, or 0]: req_pool_idx
          row,          \* [requests -> Seq(Pages)]: for each position the page of its slot
          committed,    \* [requests -> Nat]: tokens whose KV a settled step has written
          sampled,      \* [requests -> Nat]: output tokens, the last of which has no KV
          protected,    \* [requests -> Nat]: cache_protected_len
          lock,         \* [requests -> path]: of the open receipt; the root locks nothing
          steps         \* Seq of [kind, from, pages]: in flight, the oldest first

lengths  == <<committed, sampled, protected>>
requests == <<phase, reason, index, row, lengths, lock>>
vars     == <<free, tree, freeRows, requests, steps>>

Pages    == 1..PageCount
Rows     == 1..RowCount
Requests == DOMAIN Text
Root     == <<>>
Holding  == {"chunked", "running", "leaving"}
Phases   == {"new", "waiting", "finished"} \cup Holding
Reasons  == {"none", "done", "aborted", "rejected"}

In(name) == { r \in Requests : phase[r] = name }
Holders  == { r \in Requests : phase[r] \in Holding }

PagesFor(n) == (n + PageSize - 1) \div PageSize
WholeFor(n) == n \div PageSize
Larger(a, b)  == IF a < b THEN b ELSE a
Smaller(a, b) == IF a < b THEN a ELSE b

\* What a is short of b.
Missing(a, b) == IF a < b THEN b - a ELSE 0

RECURSIVE Sum(_, _)
Sum(S, f) == IF S = {} THEN 0 ELSE LET x == CHOOSE x \in S : TRUE IN f[x] + Sum(S \ {x}, f)

\* The path of the first n pages of each text: a table, since TLC evaluates constants once.
Paths == [r \in Requests |->
            [n \in 0..WholeFor(Len(Text[r])) |->
               [i \in 1..n |-> SubSeq(Text[r], (i - 1) * PageSize + 1, i * PageSize)]]]
PathOf(r, n) == Paths[r][n]

\* The path of the page that holds the i-th token, where that page is whole.
PathAt(r, i) == PathOf(r, PagesFor(i))

\* CACHE-1: the pages of row[protected : allocated).
Own(r) == { row[r][i] : i \in protected[r] + 1..Len(row[r]) }

Tokens(r)     == PromptLength[r] + sampled[r]
MaxOutputs(r) == Len(Text[r]) - PromptLength[r]

\* The steps in flight that name r.
StepsOf(r) == { i \in DOMAIN steps : r \in DOMAIN steps[i].pages }
IsNamed(r) == StepsOf(r) # {}

\* RADIX-10: what no lock covers, and how many pages there are to hand out when all of that is gone.
Locked   == UNION { Prefixes(lock[r]) : r \in Requests }
Unlocked == DOMAIN tree \ Locked
Room     == Cardinality(free) + Cardinality(Unlocked)

TypeOK ==
    /\ free \subseteq Pages
    /\ Range(tree) \subseteq Pages
    /\ freeRows \subseteq Rows
    /\ phase \in [Requests -> Phases]
    /\ reason \in [Requests -> Reasons]
    /\ index \in [Requests -> 0..RowCount]
    /\ \A r \in Requests :
         /\ row[r] \in Seq(Pages)
         /\ protected[r] <= committed[r] /\ committed[r] <= Len(row[r])
         /\ sampled[r] <= MaxOutputs(r)
    /\ \A i \in DOMAIN steps : steps[i].kind \in {"prefill", "decode"}

Init ==
    /\ free = Pages
    /\ tree = <<>>
    /\ freeRows = Rows
    /\ phase = [r \in Requests |-> "new"]
    /\ reason = [r \in Requests |-> "none"]
    /\ index = [r \in Requests |-> 0]
    /\ row = [r \in Requests |-> <<>>]
    /\ committed = index /\ sampled = index /\ protected = index
    /\ lock = [r \in Requests |-> Root]
    /\ steps = <<>>

-----------------------------------------------------------------------------
\* SCHED-22: who is leaving and in no step any more is released before anything else is done.
IsReleasable(r) == phase[r] = "leaving" /\ (~IsNamed(r) \/ Bug = "releases in flight")
Quiet   == \A r \in Requests : ~IsReleasable(r)
Settled == Quiet /\ steps = <<>>

\* SCHED-8: the slots that a request may ever have at once; the token sampled last has none.
MostSlots(r) == Len(Text[r]) - 1 + IF Bug = "forgets what is speculated" THEN 0 ELSE SpecTokens
Fits(r)      == PagesFor(MostSlots(r)) <= PageCount

\* SCHED-7: a request that could not run in an empty pool is rejected, and never owns anything.
Add(r) ==
    /\ phase[r] = "new" /\ Quiet
    /\ phase' = [phase EXCEPT ![r] = IF Fits(r) THEN "waiting" ELSE "finished"]
    /\ reason' = [reason EXCEPT ![r] = IF Fits(r) THEN @ ELSE "rejected"]
    /\ UNCHANGED <<free, tree, freeRows, index, row, lengths, lock, steps>>

-----------------------------------------------------------------------------
\* RADIX-8: the ways to evict n of the paths that may go, from the leaves on.
Evictions(may, n) ==
    { S \in SUBSET may : Cardinality(S) = n /\ IsPrefixClosed(DOMAIN tree \ S) }

PagesTo(r, size) == Missing(PagesFor(Len(row[r])), PagesFor(size))

\* PAGE-6, REQ-6: a row that goes on to `size`, with fresh pages where one begins.
Longer(names, size, fresh) ==
    LET begun == PagesFor(Len(names))
        At(i) == IF i <= Len(names) THEN names[i]
                 ELSE IF PagesFor(i) <= begun THEN names[Len(names)]
                 ELSE fresh[PagesFor(i) - begun]
    IN  [i \in 1..Larger(size, Len(names)) |-> At(i)]

\* PAGE-6, PAGE-7: the rows S go on to their sizes, and what is left of the pool.
RECURSIVE Extended(_, _, _, _)
Extended(S, size, names, pool) ==
    IF S = {} THEN [names |-> names, pool |-> pool]
    ELSE LET r     == CHOOSE r \in S : TRUE
             count == Missing(PagesFor(Len(names[r])), PagesFor(size[r]))
             fresh == Smallest(pool, count)
         IN  Extended(S \ {r}, size, [names EXCEPT ![r] = Longer(@, size[r], fresh)],
                      pool \ Range(fresh))

\* What a step names: up to `size` the row of each request, of which it writes what comes after `from`.
Step(kind, from, size, names) ==
    [kind |-> kind, from |-> from,
     pages |-> [r \in DOMAIN size |-> SubSeq(names[r], 1, size[r])]]

\* SCHED-13: whoever goes on is given slots up to size; what is short is evicted, and no more; then the
\* step is launched with a snapshot of the rows.
Launch(kind, from, size, names, may) ==
    LET S     == DOMAIN size
        count == Sum(S, [r \in S |-> Missing(PagesFor(Len(names[r])), PagesFor(size[r]))])
    IN  \E gone \in Evictions(may, Missing(Cardinality(free), count)) :
            LET after == Extended(S, size, names, free \cup { tree[p] : p \in gone })
            IN  /\ tree' = Without(tree, gone)
                /\ free' = after.pool
                /\ row' = after.names
                /\ steps' = Append(steps, Step(kind, from, size, after.names))

\* SCHED-15: who decodes next: not who has reached its length when all that is in flight is settled.
Batch == { r \in In("running") : sampled[r] + Cardinality(StepsOf(r)) < MaxOutputs(r) }

\* SCHED-24: slots for the token sampled last and for what is speculated, those in flight before.
DecodeFrom == [r \in Batch |-> committed[r] + Cardinality(StepsOf(r))]
DecodeSize == [r \in Batch |-> DecodeFrom[r] + 1 + SpecTokens]
DecodeNeed == Sum(Batch, [r \in Batch |-> PagesTo(r, DecodeSize[r])])

\* SCHED-11: a prefill leaves those who run the pages that they need next.
Reserve == IF Bug = "admits without room" THEN 0 ELSE DecodeNeed

\* SCHED-17: the prefill of a request that was retracted is of its prompt and its outputs.
Target(r) == IF Bug = "resumes without outputs" THEN PromptLength[r] ELSE Tokens(r)

\* The next chunk of r, of which `from` tokens have KV in the row `names` and `path` is locked.
LaunchPrefill(r, budget, from, path, names) ==
    LET size == Smaller(from + budget, Target(r))
        may  == Unlocked \ Prefixes(path)
        need == Missing(PagesFor(from), PagesFor(size))
    IN  /\ need + Reserve <= Cardinality(free) + Cardinality(may)
        /\ Launch("prefill", [s \in {r} |-> from], [s \in {r} |-> size],
                  [row EXCEPT ![r] = names], may)

\* RADIX-1: what the tree has of the tokens; SCHED-12: the last one is always computed.
Match(r) == Found(tree, PathOf(r, WholeFor(Target(r) - 1)))

\* REQ-2, CACHE-11: a row, the match and a lock on it.  SCHED-14: one request at a time is in its
\* prefill; if there is no room for its chunk nothing is taken.
Admit(r, budget) ==
    LET found == Match(r)
        size  == Len(found) * PageSize
        name  == CHOOSE i \in freeRows : \A j \in freeRows : i <= j
    IN  /\ phase[r] = "waiting" /\ Settled
        /\ In("chunked") = {} /\ freeRows # {}
        /\ LaunchPrefill(r, budget, size, found, [i \in 1..size |-> tree[PathAt(r, i)]])
        /\ phase' = [phase EXCEPT ![r] = "chunked"]
        /\ freeRows' = freeRows \ {name}
        /\ index' = [index EXCEPT ![r] = name]
        /\ lock' = [lock EXCEPT ![r] = found]
        /\ committed' = [committed EXCEPT ![r] = size]
        /\ protected' = [protected EXCEPT ![r] = size]
        /\ UNCHANGED <<reason, sampled>>

NextChunk(r, budget) ==
    /\ phase[r] = "chunked" /\ Settled
    /\ LaunchPrefill(r, budget, committed[r], lock[r], row[r])
    /\ UNCHANGED <<freeRows, phase, reason, index, lengths, lock>>

\* SCHED-22: a decode step may be launched over the one before; not if it speculates.
MayDecode ==
    /\ Quiet /\ Batch # {}
    /\ Len(steps) <= IF SpecTokens = 0 THEN 1 ELSE 0
    /\ \A i \in DOMAIN steps : steps[i].kind = "decode"

Decode ==
    /\ MayDecode /\ DecodeNeed <= Room
    /\ Launch("decode", DecodeFrom, DecodeSize, row, Unlocked)
    /\ UNCHANGED <<freeRows, phase, reason, index, lengths, lock>>

-----------------------------------------------------------------------------
\* CACHE-9: n tokens of r have KV: their whole pages become resident; the tree keeps what it had.
Grown(map, r, n) ==
    With(map, Prefixes(PathOf(r, WholeFor(n))), LAMBDA p : row[r][Len(p) * PageSize])

\* CACHE-3: pages of the row for which the tree already holds another one.
Duplicates(map, r, n) ==
    { row[r][i] : i \in protected[r] + 1..FoundLength(map, PathOf(r, WholeFor(n))) * PageSize }

\* CACHE-2: the row follows the tree up to the last whole committed page, and the lock with it.
CacheUnfinished(r, n) ==
    LET whole == WholeFor(n) * PageSize
    IN  /\ tree' = Grown(tree, r, n)
        /\ free' = free \cup Duplicates(tree, r, n)
        /\ row' = [row EXCEPT ![r] =
                     [i \in DOMAIN @ |-> IF i > protected[r] /\ i <= whole THEN tree'[PathAt(r, i)]
                                         ELSE @[i]]]
        /\ lock' = [lock EXCEPT ![r] = PathAt(r, whole)]
        /\ protected' = [protected EXCEPT ![r] = whole]

\* SCHED-14: a chunk has KV; after the last one a token is sampled.  Who ended meanwhile is left as it
\* is; who ends now is released, and not cached before.
SettlePrefill(r, ends) ==
    LET size == Len(Head(steps).pages[r])
        last == size = Target(r)
        done == last /\ (ends \/ sampled[r] + 1 = MaxOutputs(r))
    IN  /\ steps' = Tail(steps)
        /\ IF phase[r] # "chunked"
           THEN UNCHANGED <<free, tree, requests>>
           ELSE /\ committed' = [committed EXCEPT ![r] = size]
                /\ sampled' = [sampled EXCEPT ![r] = @ + IF last THEN 1 ELSE 0]
                /\ phase' = [phase EXCEPT ![r] = IF done THEN "leaving"
                                                 ELSE IF last THEN "running" ELSE @]
                /\ reason' = [reason EXCEPT ![r] = IF done THEN "done" ELSE @]
                /\ IF done THEN UNCHANGED <<free, tree, row, protected, lock>>
                   ELSE CacheUnfinished(r, size)
                /\ UNCHANGED index
        /\ UNCHANGED freeRows

\* SCHED-24: everyone has one token more, and of what was speculated as many as proved right.  Who ended
\* meanwhile gets none: its token is thrown away.
SettleDecode(ending, right) ==
    LET S       == DOMAIN Head(steps).pages \cap In("running")
        Gain(r) == Smaller(1 + right[r], MaxOutputs(r) - sampled[r])
        More(f) == [r \in Requests |-> IF r \in S THEN f[r] + Gain(r) ELSE f[r]]
        done    == { r \in S : r \in ending \/ sampled[r] + Gain(r) = MaxOutputs(r) }
        Now(f, value) == [r \in Requests |-> IF r \in done THEN value ELSE f[r]]
    IN  /\ steps' = Tail(steps)
        /\ committed' = More(committed)
        /\ sampled' = More(sampled)
        /\ phase' = Now(phase, "leaving")
        /\ reason' = Now(reason, "done")
        /\ UNCHANGED <<free, tree, freeRows, index, row, protected, lock>>

Settle ==
    /\ Quiet /\ steps # <<>>
    /\ LET S == DOMAIN Head(steps).pages
       IN  IF Head(steps).kind = "prefill"
           THEN \E r \in S, ends \in BOOLEAN : SettlePrefill(r, ends)
           ELSE \E ending \in SUBSET S, right \in [S -> 0..SpecTokens] : SettleDecode(ending, right)

-----------------------------------------------------------------------------
\* CACHE-4: where what r owns beyond its whole committed pages ends.
End(r, next) ==
    IF Bug = "frees committed only" THEN committed[r]
    ELSE IF Bug = "forgets the tail" /\ next = "waiting" THEN 0
    ELSE Len(row[r])

\* SCHED-18, CACHE-4, REQ-5, CACHE-12: whole committed pages stay in the tree; duplicates, the tail, what
\* was allocated beyond it, the row and the lock go back.  Outputs stay with who waits again.
Leave(r, next, map, pool) ==
    LET keepsRow  == Bug = "abort of chunked keeps row" /\ phase[r] = "chunked" /\ next = "finished"
        keepsLock == Bug = "keeps lock on retract" /\ next = "waiting"
    IN  /\ tree' = Grown(map, r, committed[r])
        /\ free' = pool \cup Duplicates(map, r, committed[r])
                     \cup { row[r][i] : i \in WholeFor(committed[r]) * PageSize + 1..End(r, next) }
        /\ freeRows' = IF keepsRow THEN freeRows ELSE freeRows \cup {index[r]}
        /\ phase' = [phase EXCEPT ![r] = next]
        /\ index' = [index EXCEPT ![r] = IF keepsRow THEN @ ELSE 0]
        /\ row' = [row EXCEPT ![r] = <<>>]
        /\ committed' = [committed EXCEPT ![r] = 0]
        /\ sampled' = [sampled EXCEPT ![r] = IF next = "waiting" THEN @ ELSE 0]
        /\ protected' = [protected EXCEPT ![r] = 0]
        /\ lock' = [lock EXCEPT ![r] = IF keepsLock THEN @ ELSE Root]
        /\ UNCHANGED steps

\* SCHED-22: who is leaving is released as soon as no step in flight names it.
Release(r) == IsReleasable(r) /\ Leave(r, "finished", tree, free) /\ UNCHANGED reason

\* SCHED-16: decode is short, whatever is evicted.
IsShort == Settled /\ Batch # {} /\ DecodeNeed > Room

\* SCHED-16: of those who run one that has no fewer outputs than the victim stays; who is in its prefill
\* may go too, for there may be nobody else.
IsVictim(r) ==
    \/ phase[r] = "chunked" /\ Bug # "spares the chunked"
    \/ /\ phase[r] = "running"
       /\ \/ \E s \in In("running") \ {r} : sampled[s] >= sampled[r]
          \/ Bug = "retracts the most outputs"

CanRetract(r) == IsShort /\ IsVictim(r)

\* SCHED-16: all that could be is evicted, and decode still short: a victim waits again.
Retract(r) ==
    /\ CanRetract(r)
    /\ Leave(r, "waiting", Without(tree, Unlocked), free \cup { tree[p] : p \in Unlocked })
    /\ UNCHANGED reason

\* SCHED-19: a request may be given up whatever it does: at once, or when no step names it any more.
Abort(r) ==
    /\ Quiet
    /\ reason' = [reason EXCEPT ![r] = "aborted"]
    /\ \/ /\ phase[r] = "waiting"
          /\ phase' = [phase EXCEPT ![r] = "finished"]
          /\ sampled' = [sampled EXCEPT ![r] = 0]
          /\ UNCHANGED <<free, tree, freeRows, index, row, committed, protected, lock, steps>>
       \/ /\ phase[r] \in {"chunked", "running"} /\ ~IsNamed(r)
          /\ Leave(r, "finished", tree, free)
       \/ /\ phase[r] \in {"chunked", "running"} /\ IsNamed(r)
          /\ phase' = [phase EXCEPT ![r] = "leaving"]
          /\ UNCHANGED <<free, tree, freeRows, index, row, lengths, lock, steps>>

\* SCHED-26: nobody is live, and no step in flight; who waits owns nothing.
Idle == steps = <<>> /\ \A r \in Requests : phase[r] \in {"new", "waiting", "finished"}

\* SCHED-26, CACHE-15: tree and pools begin anew.
Flush ==
    /\ Idle /\ DOMAIN tree # {}
    /\ tree' = <<>>
    /\ free' = Pages
    /\ UNCHANGED <<freeRows, requests, steps>>

Work ==
    \/ Settle \/ Decode
    \/ \E r \in Requests :
        \/ Release(r) \/ Add(r)
        \/ \E budget \in Budgets : Admit(r, budget) \/ NextChunk(r, budget)
        \/ Retract(r)

Next == Work \/ (\E r \in Abortable : Abort(r)) \/ Flush

\* A scheduler that can do something does something; what, is left open.
Spec == Init /\ [][Next]_vars /\ WF_vars(Work)

-----------------------------------------------------------------------------
Owners(p) ==
    { r \in Holders : p \in Own(r) }
    \cup (IF p \in free THEN {"free"} ELSE {})
    \cup (IF p \in Range(tree) THEN {"tree"} ELSE {})

\* CACHE-1: every page has one owner.
CACHE_1_OneOwner == \A p \in Pages : Cardinality(Owners(p)) = 1

\* CACHE-1: up to the protected length a row is what the tree holds on the path of its lock.
CACHE_1_RowFollowsTree ==
    \A r \in Holders :
        /\ lock[r] = PathOf(r, WholeFor(protected[r]))
        /\ \A i \in 1..protected[r] : PathAt(r, i) \in DOMAIN tree /\ row[r][i] = tree[PathAt(r, i)]

\* CACHE-1: a live row names the tree's pages and its request's own.
CACHE_1_NoDanglingRow ==
    \A r \in Holders :
        /\ Range(row[r]) \cap free = {}
        /\ \A s \in Holders \ {r} : Range(row[r]) \cap Own(s) = {}

\* SCHED-22: what a step in flight names is not free, nor anybody else's to write.
SCHED_22_NamedIsHeld ==
    \A i \in DOMAIN steps : \A r \in DOMAIN steps[i].pages :
        /\ Range(steps[i].pages[r]) \cap free = {}
        /\ \A s \in Holders \ {r} : Range(steps[i].pages[r]) \cap Own(s) = {}

\* SCHED-22: what it writes is its request's, and in no tree where another one could find it.
SCHED_22_WrittenIsOwn ==
    \A i \in DOMAIN steps : \A r \in DOMAIN steps[i].pages :
        LET pages == steps[i].pages[r]
        IN  { pages[k] : k \in steps[i].from[r] + 1..Len(pages) } \subseteq Own(r) \ Range(tree)

\* SCHED-23: no slot is written by two steps, and none left out between them.
SCHED_23_WrittenOnce ==
    \A i, j \in DOMAIN steps : i < j =>
        \A r \in DOMAIN steps[i].pages \cap DOMAIN steps[j].pages :
            steps[j].from[r] = Len(steps[i].pages[r])

\* SCHED-17: all that is committed is what a request must have to decode its next token.
SCHED_17_KvIsComplete == \A r \in In("running") : committed[r] = Tokens(r) - 1

\* SCHED-8: who waits or has ended has no page, row or lock.
SCHED_8_NothingLeftBehind ==
    \A r \in Requests \ Holders :
        index[r] = 0 /\ row[r] = <<>> /\ lock[r] = Root /\ protected[r] = 0 /\ ~IsNamed(r)

\* SCHED-19: who leaves or has left says why, once and for all; who was rejected could not have run.
SCHED_19_ReasonGiven ==
    \A r \in Requests :
        /\ (reason[r] = "none") <=> phase[r] \notin {"leaving", "finished"}
        /\ reason[r] = "rejected" => phase[r] = "finished" /\ ~Fits(r)
SCHED_19_ReasonStays == [][\A r \in Requests : reason[r] \in {"none", reason'[r]}]_vars

\* SCHED-14: one request at a time is in its prefill, and a step of it is in flight alone.
SCHED_14_OneChunked ==
    /\ Cardinality(In("chunked")) <= 1
    /\ \A i \in DOMAIN steps : steps[i].kind = "prefill" => Len(steps) = 1

\* SCHED-22: two decode steps are in flight at most, and one that speculates alone.
SCHED_22_OverlapOfTwo == Len(steps) <= IF SpecTokens = 0 THEN 2 ELSE 1

\* REQ-1: every row is free or of one request.
REQ_1_RowsOnce ==
    /\ freeRows \cup { index[r] : r \in Holders } = Rows
    /\ Cardinality(freeRows) + Cardinality(Holders) = RowCount

\* SCHED-8: when nobody is live the tree has all that is not free, all rows are free, no lock is held.
SCHED_8_IdleHasAll ==
    Idle => /\ free \cup Range(tree) = Pages /\ free \cap Range(tree) = {}
            /\ freeRows = Rows /\ Locked = {}

\* RADIX-5, RADIX-11: prefix-closed, and the path of a lock resident.
RADIX_5_PrefixClosed == IsPrefixClosed(DOMAIN tree)
RADIX_11_LockedIsResident == Locked \subseteq DOMAIN tree

\* SCHED-16: of those who run the one with the most outputs is never retracted.
SCHED_16_MostOutputsStays ==
    [][\A r \in Requests : phase[r] = "running" /\ phase'[r] = "waiting" =>
        \E s \in Requests \ {r} : phase'[s] = "running" /\ sampled[s] >= sampled[r]]_vars

\* SCHED-17: as long as a request has not ended it keeps its outputs.
SCHED_17_OutputsStay ==
    [][\A r \in Requests : phase'[r] # "finished" => sampled'[r] >= sampled[r]]_vars

\* SCHED-26, CACHE-15: the tree is emptied, and nothing else done, only when nobody is live.
SCHED_26_NobodyOwnsAtFlush ==
    [][DOMAIN tree # {} /\ DOMAIN tree' = {} /\ requests' = requests =>
        steps = <<>> /\ steps' = <<>> /\ Holders = {}]_vars

\* SCHED-29: everyone is finished some day.
SCHED_29_EveryoneFinishes == <>(\A r \in Requests : phase[r] = "finished")
=============================================================================
