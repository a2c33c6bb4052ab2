// Row names: which pages every row names, and which rows name a page.  Spec: LEDGER.
//
// A row is pieces, ascending and apart: [start, stop) names `page`.  Neighbours of one page are one
// piece, so a row that is written in order has a piece a page.  Every piece stands in the list of
// its page as well:
//
//     the names of page p  ==  the pieces of all rows whose page is p
//
// A row keeps its memory when it forgets what it names, so a steady state does not allocate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "kvspec/slots.hpp"

namespace kvspec {

class RowNames {
 public:
  struct Piece {
    std::uint32_t start;  // positions [start, stop); neither is above 2^31
    std::uint32_t stop;
    PageId page;
    std::int32_t name = -1;  // in the list of the page
  };

  // O(pages + rows).
  RowNames(std::size_t page_count, std::size_t row_count)
      : first_(page_count + 1, -1), rows_(row_count) {}

  std::span<const Piece> names(std::size_t row) const noexcept { return rows_[row].names; }
  // What the row named when forget() was called last.
  std::span<const Piece> forgotten(std::size_t row) const noexcept { return rows_[row].forgotten; }

  // Makes replace(row) of these pieces no-throw; they are ascending and apart.  O(pieces given and
  // met).
  void prepare(std::size_t row, std::span<const Piece> pieces);
  // The positions of the pieces name their pages, and whatever else they named no longer.
  // REQUIRES: prepare(row, ...) was the last call that is not const.  O(pieces given and met), and
  // what is behind them moves if their number changes.
  void replace(std::size_t row) noexcept;
  // The row names nothing; forget() keeps what it named as forgotten.  O(pieces).
  void drop(std::size_t row) noexcept;
  void forget(std::size_t row) noexcept;

  // Calls visit(row, start) for each piece that names the page.  O(pieces).
  template <class Visit>
  void visit(PageId page, Visit visit) const {
    for (std::int32_t at = first_[index(page)]; at >= 0; at = names_[index(at)].after) {
      visit(static_cast<std::size_t>(names_[index(at)].row), names_[index(at)].start);
    }
  }

  // Throws ContractError (LEDGER-1) if rows and lists differ.  O(pages + pieces).
  void check() const;

 private:
  friend struct PlantedFault;  // tests/cpp: books are broken there to see check() find it

  struct Row {
    std::vector<Piece> names;
    std::vector<Piece> forgotten;
  };

  // A piece in the list of its page, or, by `after` alone, in the list of unused ones.
  struct Name {
    std::int32_t row;
    std::uint32_t start;
    std::int32_t before;
    std::int32_t after;
  };

  static std::size_t index(std::int32_t at) noexcept { return static_cast<std::size_t>(at); }
  std::pair<std::size_t, std::size_t> met(std::size_t row, std::span<const Piece> pieces) const;
  void add_spliced(std::uint32_t start, std::uint32_t stop, PageId page);
  void link(std::size_t row, Piece& piece) noexcept;
  void unlink(const Piece& piece) noexcept;

  std::vector<std::int32_t> first_;  // of each page, -1 without a name
  std::vector<Row> rows_;
  std::vector<Name> names_;
  std::int32_t unused_ = -1;
  std::size_t unused_count_ = 0;
  std::vector<Piece> spliced_;  // what stands for pieces [met_.first, met_.second) of the row
  std::pair<std::size_t, std::size_t> met_;
};

}  // namespace kvspec
