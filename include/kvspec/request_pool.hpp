// Request pool: a row for each request, and the slots of its tokens.  Spec: REQ.
//
//     |free| + |live| == rows, and no row is in both (REQ-1)
//
// The books keep each live row at its real length.  The dense table that an attention kernel reads
// is a copy of them (REQ-8): one in host memory is written together with the books; for one on a
// device the books remember which positions it lacks, and commit is
//
//     n = unsent_count(); pack(positions, slots); copy and scatter; sent();
//
// A row keeps its memory when it is freed, so a steady state does not allocate.  Not thread-safe:
// one scheduler thread owns a pool.  After any exception, std::bad_alloc included, the pool is as
// before: what can throw comes first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kvspec/observer.hpp"

namespace kvspec {

// Exact costs so far (REQ-13).
struct RequestPoolCounters {
  std::int64_t rows_moved = 0;         // rows that entered or left the free list
  std::int64_t positions_written = 0;  // positions of the books that were set
  std::int64_t positions_sent = 0;     // positions that commits sent to the device
};

class RequestPool {
 public:
  using Slot = std::int32_t;

  // A pool of size + pre_alloc_size rows (REQ-11).  REQUIRES: neither is negative, their sum is
  // below 2^31, max_context_len is in [1, 2^31) (REQ-12).  O(rows).
  RequestPool(std::int64_t size, std::int64_t pre_alloc_size, std::int64_t max_context_len);
  RequestPool(const RequestPool&) = delete;
  RequestPool& operator=(const RequestPool&) = delete;

  // From now on write() writes to this table too.  REQUIRES: row_count * max_context_len slots of
  // zeros that outlive the pool; no row is live.
  void mirror(Slot* table) noexcept { table_ = table; }

  std::int64_t row_count() const noexcept { return static_cast<std::int64_t>(rows_.size()); }
  std::int64_t max_context_len() const noexcept { return max_context_len_; }
  // Rows that alloc() can hand out.  O(1).
  std::int64_t available_size() const noexcept { return static_cast<std::int64_t>(free_count_); }

  // The rows that have been free longest, now live and empty; nullopt and no change if there are
  // too few (REQ-2, REQ-3).  REQUIRES: need_size >= 0 (REQ-4).  O(need_size).
  std::optional<std::vector<std::int64_t>> alloc(std::int64_t need_size);

  // Makes rows free, last in the order given, and forgets their slots (REQ-5).  REQUIRES: each is
  // live and named once (REQ-4).  O(rows named).
  void free(std::span<const std::int64_t> rows);

  // Sets positions [start, stop) of one row (REQ-6).  REQUIRES (REQ-7): the row is live, start is
  // at most its length, stop at most max_context_len, and there are as many slots, all in
  // [1, 2^31).  O(slots).
  void write_run(std::int64_t row, std::int64_t start, std::int64_t stop,
                 std::span<const std::int64_t> slots);

  // Sets positions[i] of rows[i], or of rows[0] if it is the only one, to slots[i], in order
  // (REQ-6).  REQUIRES (REQ-7): as write_run, for each when its turn comes; as many slots as
  // positions.  O(positions named).
  void write(std::span<const std::int64_t> rows, std::span<const std::int64_t> positions,
             std::span<const std::int64_t> slots);

  // REQUIRES: as many slots as positions (REQ-7).
  static void require_count(std::uint64_t slot_count, std::uint64_t position_count);

  // The slots of a live row, valid until the next call that is not const.  REQUIRES: row is live.
  std::span<const Slot> row(std::int64_t row) const;

  // Makes every row free, ascending (REQ-9).  O(row_count).
  void clear();

  // Positions written since the last sent() and still in the books, each once (REQ-8).  O(ranges
  // written, log of it for each).
  std::size_t unsent_count() noexcept;
  // Those positions as indices into the flat table, ascending, and their slots.  REQUIRES: room for
  // unsent_count() of each, which was called last.
  void pack(std::span<std::int64_t> positions, std::span<Slot> slots) const noexcept;
  // The table has what was packed.
  void sent() noexcept;

  // REQUIRES: not called from inside the observer (OBS-3).
  void attach(Observer observer) { reporter_.attach(observer); }
  void guard(const char* name) const { reporter_.guard(name); }

  std::vector<std::int64_t> free_rows() const;  // the next to be handed out first; O(row_count)
  std::vector<std::int64_t> live_rows() const;  // ascending; O(row_count)
  RequestPoolCounters counters() const noexcept { return counters_; }

  // Throws ContractError if the free list and the live rows break REQ-1, or if the table given has
  // other slots than the books at a position that was sent (REQ-8); null: there is no table to
  // compare.  O(row_count + slots written).
  void check(const Slot* table);

 private:
  friend struct PlantedFault;  // tests/cpp: books are broken there to see check() find it

  enum class State : std::uint8_t { free, live, named };

  struct Row {
    std::vector<Slot> slots;     // empty unless live
    std::size_t next_length = 0;  // slots.size(), but while write() looks at its arguments
    State state = State::free;    // named: live, and seen by the call at hand
  };

  // Positions [start, stop) of a row that the device's table lacks.
  struct Range {
    std::int32_t row;
    std::int32_t start;
    std::int32_t stop;
  };

  // The arguments of write(): position i is of row i, or of the only row.
  struct Places {
    std::span<const std::int64_t> rows;
    std::span<const std::int64_t> positions;
    std::span<const std::int64_t> slots;

    std::int64_t row(std::size_t i) const noexcept { return rows[rows.size() == 1 ? 0 : i]; }
    std::size_t position(std::size_t i) const noexcept {
      return static_cast<std::size_t>(positions[i]);
    }
  };

  bool is_live(std::int64_t row) const noexcept;
  Row& at(std::int64_t row) noexcept { return rows_[static_cast<std::size_t>(row)]; }
  const Row& at(std::int64_t row) const noexcept { return rows_[static_cast<std::size_t>(row)]; }
  [[noreturn]] void refuse_free(std::int64_t row, std::span<const std::int64_t> named);
  void require_shape(const Places& places) const;
  void measure(const Places& places);  // sets next_length; REQUIRES: require_shape
  void set(const Places& places) noexcept;
  std::vector<Slot> slots_at(const Places& places) const;
  std::vector<std::int64_t> once_each(std::span<const std::int64_t> rows);
  bool fits(std::int64_t position, std::size_t length, std::int64_t slot) const noexcept;
  [[noreturn]] void refuse_place(const Places& places, std::size_t i) const;
  void push_free(std::int64_t row) noexcept;
  void make_all_free() noexcept;
  Slot* table_row(std::int64_t row) const noexcept;
  void reserve_unsent(std::size_t more);
  void add_unsent(std::int64_t row, std::size_t start, std::size_t stop) noexcept;
  void merge_unsent() noexcept;
  void check_rows() const;
  void check_table(const Slot* table);

  std::int64_t max_context_len_;
  std::vector<Row> rows_;
  std::vector<std::int32_t> free_;  // a ring of the free rows: free_count_ from free_head_ on
  std::size_t free_head_ = 0;
  std::size_t free_count_;
  Slot* table_ = nullptr;       // in host memory, or null
  std::vector<Range> unsent_;   // in the order written, unless merged; empty if table_
  RequestPoolCounters counters_;
  Reporter reporter_{"request_pool"};
};

}  // namespace kvspec
