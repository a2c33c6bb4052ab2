#include "kvspec/row_names.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "kvspec/contract.hpp"
#include "kvspec/grow.hpp"

namespace kvspec {

// The pieces of the row that these overlap or touch: all that replace() looks at.
std::pair<std::size_t, std::size_t> RowNames::met(std::size_t row,
                                                  std::span<const Piece> pieces) const {
  const std::span<const Piece> names = rows_[row].names;
  if (pieces.empty() || names.empty() || names.back().stop < pieces.front().start) {
    return {names.size(), names.size()};
  }
  const auto first = std::ranges::lower_bound(names, pieces.front().start, {}, &Piece::stop);
  const auto last = std::ranges::upper_bound(names, pieces.back().stop, {}, &Piece::start);
  return {static_cast<std::size_t>(first - names.begin()),
          static_cast<std::size_t>(last - names.begin())};
}

void RowNames::add_spliced(std::uint32_t start, std::uint32_t stop, PageId page) {
  if (start >= stop) return;
  if (!spliced_.empty() && spliced_.back().stop == start && spliced_.back().page == page) {
    spliced_.back().stop = stop;
  } else {
    spliced_.push_back({start, stop, page});
  }
}

void RowNames::prepare(std::size_t row, std::span<const Piece> pieces) {
  met_ = met(row, pieces);
  spliced_.clear();
  std::vector<Piece>& names = rows_[row].names;
  std::span<const Piece> old = std::span(names).subspan(met_.first, met_.second - met_.first);
  // Of the old pieces, what lies in [from, to), between two of the new ones.
  const auto keep = [&](std::uint32_t from, std::uint32_t to) {
    for (; !old.empty() && old.front().start < to; old = old.subspan(1)) {
      const Piece& piece = old.front();
      add_spliced(std::max(piece.start, from), std::min(piece.stop, to), piece.page);
      if (piece.stop > to) break;
    }
  };
  std::uint32_t from = 0;
  for (const Piece& piece : pieces) {
    keep(from, piece.start);
    add_spliced(piece.start, piece.stop, piece.page);
    from = piece.stop;
  }
  keep(from, std::numeric_limits<std::uint32_t>::max());

  grow(names, spliced_.size());
  if (unused_count_ >= spliced_.size()) return;
  grow(names_, spliced_.size() - unused_count_);
  while (unused_count_ < spliced_.size()) {
    names_.push_back({-1, 0, -1, unused_});
    unused_ = static_cast<std::int32_t>(names_.size() - 1);
    ++unused_count_;
  }
}

void RowNames::replace(std::size_t row) noexcept {
  std::vector<Piece>& names = rows_[row].names;
  const auto [first, last] = met_;
  for (std::size_t at = first; at < last; ++at) unlink(names[at]);
  for (Piece& piece : spliced_) link(row, piece);
  const auto place = names.begin() + static_cast<std::ptrdiff_t>(first);
  const std::size_t common = std::min(spliced_.size(), last - first);
  const auto end = spliced_.begin() + static_cast<std::ptrdiff_t>(common);
  const auto rest = std::copy(spliced_.begin(), end, place);
  names.erase(rest, rest + static_cast<std::ptrdiff_t>(last - first - common));
  names.insert(names.begin() + static_cast<std::ptrdiff_t>(first + common), end, spliced_.end());
  spliced_.clear();
}

void RowNames::drop(std::size_t row) noexcept {
  for (const Piece& piece : rows_[row].names) unlink(piece);
  rows_[row].names.clear();
}

void RowNames::forget(std::size_t row) noexcept {
  for (const Piece& piece : rows_[row].names) unlink(piece);
  rows_[row].forgotten.swap(rows_[row].names);
  rows_[row].names.clear();
}

void RowNames::link(std::size_t row, Piece& piece) noexcept {
  const std::int32_t at = unused_;
  unused_ = names_[index(at)].after;
  --unused_count_;
  std::int32_t& first = first_[index(piece.page)];
  names_[index(at)] = {static_cast<std::int32_t>(row), piece.start, -1, first};
  if (first >= 0) names_[index(first)].before = at;
  first = piece.name = at;
}

void RowNames::unlink(const Piece& piece) noexcept {
  Name& name = names_[index(piece.name)];
  (name.before >= 0 ? names_[index(name.before)].after : first_[index(piece.page)]) = name.after;
  if (name.after >= 0) names_[index(name.after)].before = name.before;
  name.after = unused_;
  unused_ = piece.name;
  ++unused_count_;
}

// A name for every piece, and as many names as pieces.
void RowNames::check() const {
  const auto require = [](bool sound) {
    if (!sound) refuse("LEDGER-1", "the names of pages are not what the rows name");
  };
  std::size_t piece_count = 0;
  for (const Row& row : rows_) {
    std::uint32_t end = 0;
    for (const Piece& piece : row.names) {
      require(end <= piece.start && piece.start < piece.stop);
      end = piece.stop;
    }
    piece_count += row.names.size();
  }
  for (std::size_t page = 0; page < first_.size(); ++page) {
    for (std::int32_t at = first_[page]; at >= 0; at = names_[index(at)].after, --piece_count) {
      const Name& name = names_[index(at)];
      const std::vector<Piece>& names = rows_[index(name.row)].names;
      const auto piece = std::ranges::lower_bound(names, name.start, {}, &Piece::start);
      require(piece_count > 0 && piece != names.end() && piece->start == name.start);
      require(index(piece->page) == page && piece->name == at);
    }
  }
  require(piece_count == 0);
}

}  // namespace kvspec
