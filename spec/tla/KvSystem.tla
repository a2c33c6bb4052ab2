------------------------------ MODULE KvSystem ------------------------------
(* Page allocator, radix cache and request pool at work together, through    *)
(* cache_unfinished_req and cache_finished_req.  Clause ids refer to         *)
(* spec/prefix_cache.md, and where they say so to the other rooms.           *)
(*                                                                           *)
(*   row:   [0 .... protected)     [protected .. fill)  [fill .. allocated)  *)
(*   owner: the tree, by the lock  the request          the request          *)
(*                                                                           *)
(* Which leaf is evicted is left open, so every policy is covered.  Tokens   *)
(* are computed some time after their slots are allocated: between the two   *)
(* the other request may do what it likes.                                   *)
EXTENDS Trie

CONSTANTS PageCount,    \* the pages are 1 .. PageCount
          PageSize,     \* tokens in a page
          RowCount,     \* rows of the request pool
          Text,         \* [requests -> Seq(tokens)]: prompt, then what will be sampled
          PromptLength, \* [requests -> Nat]
          Budgets,      \* set of Nat: how many tokens of a prompt one chunk may bring
          BugMidPage    \* BOOLEAN: take len(prefix_indices) for cache_protected_len

VARIABLES free,         \* SUBSET Pages
          tree,         \* [resident paths -> Pages]; a symbol of a path is a page of tokens
          freeRows,     \* Seq(rows): the next to be handed out first
          rows,         \* [rows -> Seq(Pages)]: for each position the page of its slot
          phase,        \* [requests -> {"waiting", "running", "done"}]
          index,        \* [requests -> row, or 0]: req_pool_idx
          fill,         \* [requests -> Nat]: tokens that have KV, the committed length
          sampled,      \* [requests -> Nat]: output tokens, the last of which has no KV
          protected,    \* [requests -> Nat]: cache_protected_len
          prefix,       \* [requests -> Nat]: len(prefix_indices)
          lock          \* [requests -> path]: of the open receipt; the root locks nothing

vars == <<free, tree, freeRows, rows, phase, index, fill, sampled, protected, prefix, lock>>
lengths == <<fill, sampled, protected, prefix>>

Pages    == 1..PageCount
Rows     == 1..RowCount
Requests == DOMAIN Text
Root     == <<>>

Row(r)       == rows[index[r]]
Running      == { r \in Requests : phase[r] = "running" }
PagesFor(n)  == (n + PageSize - 1) \div PageSize
WholeFor(n)  == n \div PageSize

\* The path of the first n pages of each text: a table, since TLC evaluates constants once.
ASSUME \A r \in Requests : Len(Text[r]) % PageSize = 0
Paths == [r \in Requests |->
            [n \in 0..WholeFor(Len(Text[r])) |->
               [i \in 1..n |-> SubSeq(Text[r], (i - 1) * PageSize + 1, i * PageSize)]]]
PathOf(r, n) == Paths[r][n]

\* The path of the page that holds the i-th token.
PathAt(r, i) == PathOf(r, PagesFor(i))

\* CACHE-1: the pages of row[protected : allocated).
Own(r) == { Row(r)[i] : i \in protected[r] + 1..Len(Row(r)) }

IsLocked(p) == \E r \in Running : p \in Prefixes(lock[r])

TypeOK ==
    /\ free \subseteq Pages
    /\ Range(tree) \subseteq Pages
    /\ freeRows \in Seq(Rows)
    /\ rows \in [Rows -> Seq(Pages)]
    /\ phase \in [Requests -> {"waiting", "running", "done"}]
    /\ index \in [Requests -> 0..RowCount]
    /\ \A r \in Running :
         protected[r] <= prefix[r] /\ prefix[r] <= fill[r] /\ fill[r] <= Len(Row(r))

Init ==
    /\ free = Pages
    /\ tree = <<>>
    /\ freeRows = [i \in Rows |-> i]
    /\ rows = [i \in Rows |-> <<>>]
    /\ phase = [r \in Requests |-> "waiting"]
    /\ lock = [r \in Requests |-> Root]
    /\ index = [r \in Requests |-> 0]
    /\ fill = index /\ sampled = index /\ protected = index /\ prefix = index

-----------------------------------------------------------------------------
\* REQ-2, RADIX-1, CACHE-11: a row, what the tree has of the prompt, and a lock on it.  The last
\* token of a prompt is always computed.
Admit(r) ==
    LET found == Found(tree, PathOf(r, WholeFor(PromptLength[r] - 1)))
        size  == Len(found) * PageSize
        row   == Head(freeRows)
    IN  /\ phase[r] = "waiting" /\ freeRows # <<>>
        /\ phase' = [phase EXCEPT ![r] = "running"]
        /\ freeRows' = Tail(freeRows)
        /\ index' = [index EXCEPT ![r] = row]
        /\ rows' = [rows EXCEPT ![row] = [i \in 1..size |-> tree[PathAt(r, i)]]]
        /\ lock' = [lock EXCEPT ![r] = found]
        /\ fill' = [fill EXCEPT ![r] = size]
        /\ protected' = [protected EXCEPT ![r] = size]
        /\ prefix' = [prefix EXCEPT ![r] = size]
        /\ UNCHANGED <<free, tree, sampled>>

Needed(r, n) == PagesFor(Len(Row(r)) + n) - PagesFor(Len(Row(r)))

\* PAGE-6, REQ-6: n more slots; a page that has been begun is filled first.
Extend(r, n) ==
    LET row   == Row(r)
        begun == PagesFor(Len(row))
        fresh == Smallest(free, Needed(r, n))
        PageAt(i) == IF i <= Len(row) THEN row[i]
                     ELSE IF PagesFor(i) <= begun THEN row[Len(row)]
                     ELSE fresh[PagesFor(i) - begun]
    IN  /\ Needed(r, n) <= Cardinality(free)
        /\ rows' = [rows EXCEPT ![index[r]] = [i \in 1..Len(row) + n |-> PageAt(i)]]
        /\ free' = free \ Range(fresh)
        /\ UNCHANGED <<tree, freeRows, phase, index, lock, lengths>>

Idle(r) == phase[r] = "running" /\ fill[r] = Len(Row(r))

WantsChunk(r)  == Idle(r) /\ fill[r] < PromptLength[r]
WantsDecode(r) == Idle(r) /\ fill[r] >= PromptLength[r] /\ fill[r] < Len(Text[r])

\* As much of the prompt as a budget allows.
ChunkLength(r, budget) ==
    IF budget < PromptLength[r] - fill[r] THEN budget ELSE PromptLength[r] - fill[r]

\* PAGE-6: slots for the next tokens of the prompt; a chunk may end within a page.
Chunk(r, budget) == WantsChunk(r) /\ Extend(r, ChunkLength(r, budget))

\* PAGE-7: a slot for the token sampled last.
Decode(r) == WantsDecode(r) /\ Extend(r, 1)

Short(r) ==
    \/ \E budget \in Budgets :
         WantsChunk(r) /\ Needed(r, ChunkLength(r, budget)) > Cardinality(free)
    \/ WantsDecode(r) /\ Needed(r, 1) > Cardinality(free)

\* PAGE-4: too few pages, no change.
ExtendRefused(r) == Short(r) /\ UNCHANGED vars

\* RADIX-8, RADIX-10, RADIX-11: when a request is short, a leaf that nobody locks goes.
Evict ==
    \E p \in Leaves(DOMAIN tree) :
        /\ ~IsLocked(p)
        /\ \E r \in Requests : Short(r)
        /\ tree' = Without(tree, {p})
        /\ free' = free \cup {tree[p]}
        /\ UNCHANGED <<freeRows, rows, phase, index, lock, lengths>>

\* No clause, the forward pass: the slots allocated hold KV; after the prompt a token is sampled.
Compute(r) ==
    /\ phase[r] = "running" /\ fill[r] < Len(Row(r))
    /\ fill' = [fill EXCEPT ![r] = Len(Row(r))]
    /\ sampled' = [sampled EXCEPT ![r] = @ + IF Len(Row(r)) >= PromptLength[r] THEN 1 ELSE 0]
    /\ UNCHANGED <<free, tree, freeRows, rows, phase, index, protected, prefix, lock>>

\* Where duplicates begin.  The bug: a tail within a page belongs to the request, not to the tree.
From(r) == IF BugMidPage THEN prefix[r] ELSE protected[r]

\* CACHE-3: pages of the row for which the tree already holds another one.
Duplicates(r) ==
    LET found == FoundLength(tree, PathOf(r, WholeFor(fill[r]))) * PageSize
    IN  { Row(r)[i] : i \in From(r) + 1..found }

\* CACHE-9: whole committed pages become resident; the tree keeps what it had.
Grown(r) ==
    With(tree, Prefixes(PathOf(r, WholeFor(fill[r]))), LAMBDA p : Row(r)[Len(p) * PageSize])

\* CACHE-2: the row follows the tree up to the last whole committed page, and the lock with it.
CacheUnfinished(r) ==
    LET row   == Row(r)
        whole == WholeFor(fill[r]) * PageSize
    IN  /\ phase[r] = "running" /\ fill[r] > prefix[r]
        /\ tree' = Grown(r)
        /\ free' = free \cup Duplicates(r)
        /\ rows' = [rows EXCEPT ![index[r]] =
                      [i \in DOMAIN row |-> IF i > From(r) /\ i <= whole THEN tree'[PathAt(r, i)]
                                            ELSE row[i]]]
        /\ lock' = [lock EXCEPT ![r] = PathAt(r, whole)]
        /\ protected' = [protected EXCEPT ![r] = whole]
        /\ prefix' = [prefix EXCEPT ![r] = fill[r]]
        /\ UNCHANGED <<freeRows, phase, index, fill, sampled>>

\* REQ-5, CACHE-12: the row is free, last in line, and the lock released.
Leave(r) ==
    /\ phase' = [phase EXCEPT ![r] = "done"]
    /\ freeRows' = Append(freeRows, index[r])
    /\ rows' = [rows EXCEPT ![index[r]] = <<>>]
    /\ index' = [index EXCEPT ![r] = 0]
    /\ lock' = [lock EXCEPT ![r] = Root]
    /\ fill' = [fill EXCEPT ![r] = 0]
    /\ sampled' = [sampled EXCEPT ![r] = 0]
    /\ protected' = [protected EXCEPT ![r] = 0]
    /\ prefix' = [prefix EXCEPT ![r] = 0]

\* CACHE-4: duplicates, the tail and what was allocated beyond it go back.
CacheFinished(r) ==
    /\ phase[r] = "running" /\ sampled[r] > 0
    /\ tree' = Grown(r)
    /\ free' = free \cup Duplicates(r)
                 \cup { Row(r)[i] : i \in WholeFor(fill[r]) * PageSize + 1..Len(Row(r)) }
    /\ Leave(r)

\* PAGE-9, CACHE-12: a request that is given up caches nothing; what it owns goes back.
Abort(r) ==
    /\ phase[r] = "running"
    /\ free' = free \cup Own(r)
    /\ UNCHANGED tree
    /\ Leave(r)

Next ==
    \/ \E r \in Requests :
        \/ Admit(r)
        \/ \E budget \in Budgets : Chunk(r, budget)
        \/ Decode(r) \/ ExtendRefused(r)
        \/ Compute(r)
        \/ CacheUnfinished(r) \/ CacheFinished(r) \/ Abort(r)
    \/ Evict

Spec == Init /\ [][Next]_vars

-----------------------------------------------------------------------------
Owners(p) ==
    { r \in Running : p \in Own(r) }
    \cup (IF p \in free THEN {"free"} ELSE {})
    \cup (IF p \in Range(tree) THEN {"tree"} ELSE {})

\* CACHE-1: every page has one owner.
CACHE_1_OneOwner == \A p \in Pages : Cardinality(Owners(p)) = 1

\* CACHE-1: up to the protected length a row is what the tree holds on the path of its lock.
CACHE_1_RowFollowsTree ==
    \A r \in Running :
        /\ lock[r] = PathOf(r, WholeFor(protected[r]))
        /\ \A i \in 1..protected[r] : PathAt(r, i) \in DOMAIN tree /\ Row(r)[i] = tree[PathAt(r, i)]

\* CACHE-1: no position of a live row names a page that is free or another request's.
CACHE_1_NoDanglingRow ==
    \A r \in Running :
        /\ Range(Row(r)) \cap free = {}
        /\ \A s \in Running \ {r} : Range(Row(r)) \cap Own(s) = {}

\* CACHE-1: what the request has computed alone lies in pages in order, a page for each page.
CACHE_1_RowIsPageAligned ==
    \A r \in Running : \A i, j \in DOMAIN Row(r) :
        (PagesFor(i) = PagesFor(j)) <=> (Row(r)[i] = Row(r)[j])

\* CACHE-2: the protected length is the whole part of what prefix_indices covers.
CACHE_2_WholePagesProtected ==
    \A r \in Running : protected[r] = WholeFor(prefix[r]) * PageSize

\* CACHE-3: exactly the request's pages that duplicate the tree's go back.
CACHE_3_DuplicatesGoBack ==
    [][\A r \in Requests : prefix'[r] # prefix[r] /\ CacheUnfinished(r) =>
        free' \ free = { Row(r)[i] : i \in { j \in protected[r] + 1..WholeFor(fill[r]) * PageSize :
            PathAt(r, j) \in DOMAIN tree /\ tree[PathAt(r, j)] # Row(r)[j] } }]_vars

\* CACHE-4: what the request owned is in the tree or free, and its whole committed pages resident.
CACHE_4_NothingKept ==
    [][\A r \in Requests : phase'[r] # phase[r] /\ CacheFinished(r) =>
        /\ free' = free \cup (Own(r) \ Range(tree'))
        /\ Prefixes(PathOf(r, WholeFor(fill[r]))) \subseteq DOMAIN tree']_vars

\* CACHE-4: who is not running has no row and no lock.
CACHE_4_NothingHeldAfterwards ==
    \A r \in Requests \ Running : index[r] = 0 /\ lock[r] = Root

\* REQ-1: every row is free or live, once.
REQ_1_RowsOnce ==
    /\ Range(freeRows) \cup { index[r] : r \in Running } = Rows
    /\ Len(freeRows) + Cardinality(Running) = RowCount

\* RADIX-5: prefix-closed, and one page for each path.
RADIX_5_PrefixClosed == IsPrefixClosed(DOMAIN tree)
RADIX_5_OnePagePerPath == \A p, q \in DOMAIN tree : tree[p] = tree[q] => p = q

\* RADIX-11: the path of a lock is resident.
RADIX_11_LockedIsResident == \A r \in Running : Prefixes(lock[r]) \subseteq DOMAIN tree
=============================================================================
