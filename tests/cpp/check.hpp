// A test program without a framework: TEST, CHECK, and memory that runs out on demand.
//
// This header defines main and replaces operator new: include it in one source of a program only.
//
//     TEST(refused_alloc_changes_nothing) { CHECK(pool.alloc(9) == std::nullopt); }
//
// main runs every test, or those whose names contain its first argument, and returns the number
// of failed ones (at most 1).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace kvspec::test {

struct Case {
  const char* name;
  void (*body)();
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registered {
  Registered(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

// Allocations to grant before one fails; negative: all of them.
inline std::atomic<std::int64_t> allocations_granted = -1;
// Allocations asked for since the program began.
inline std::atomic<std::int64_t> allocation_count = 0;

// While it lives, the n-th allocation from its birth (n >= 1) throws std::bad_alloc, once.
class FailNthAllocation {
 public:
  explicit FailNthAllocation(std::int64_t n) { allocations_granted = n - 1; }
  ~FailNthAllocation() { allocations_granted = -1; }
  FailNthAllocation(const FailNthAllocation&) = delete;
  FailNthAllocation& operator=(const FailNthAllocation&) = delete;

  // Whether fewer allocations than n were asked for, so that none has failed.
  bool spared() const noexcept { return allocations_granted >= 0; }
};

// Fails the n-th allocation of `action` on a fresh subject for n = 1, 2, ... until none is left to
// fail, and calls `unchanged(subject)` whenever the failure came out as std::bad_alloc: an action
// may also do without the memory.  Returns how many allocations it makes.
template <class Make, class Action, class Unchanged>
std::int64_t fail_each_allocation(Make make, Action action, Unchanged unchanged) {
  for (std::int64_t n = 1;; ++n) {
    auto subject = make();
    bool thrown = false;
    bool spared = false;
    {
      const FailNthAllocation armed(n);
      try {
        action(subject);
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
      spared = armed.spared();
    }
    if (spared) return n - 1;
    if (thrown) unchanged(subject);
  }
}

// Whether `action` throws an error of type Error whose text begins with `start`.
template <class Error, class Action>
bool throws(std::string_view start, Action action) {
  try {
    action();
  } catch (const Error& error) {
    return std::string_view(error.what()).starts_with(start);
  }
  return false;
}

inline int run(std::string_view only) {
  int failures = 0;
  int count = 0;
  for (const Case& test : cases()) {
    if (std::string_view(test.name).find(only) == std::string_view::npos) continue;
    ++count;
    try {
      test.body();
    } catch (const std::exception& error) {
      ++failures;
      std::printf("FAILED %s: %s\n", test.name, error.what());
    }
  }
  std::printf("%d tests, %d failed\n", count, failures);
  return failures == 0 && count > 0 ? 0 : 1;
}

}  // namespace kvspec::test

#define TEST(name)                                                               \
  static void test_##name();                                                     \
  static const ::kvspec::test::Registered registered_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition) \
  ((condition) ? void(0) : ::kvspec::test::fail(__FILE__, __LINE__, #condition))

// Out of line, because g++ takes an inlined pair of malloc and free for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t alignment) {
  ++kvspec::test::allocation_count;
  if (kvspec::test::allocations_granted >= 0 && kvspec::test::allocations_granted-- == 0) {
    throw std::bad_alloc();
  }
  const auto unit = static_cast<std::size_t>(alignment);
  if (void* memory = std::aligned_alloc(unit, (bytes / unit + 1) * unit)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  return operator new(bytes, std::align_val_t{__STDCPP_DEFAULT_NEW_ALIGNMENT__});
}
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  try {
    return operator new(bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
// The array forms as well: a sanitizer brings its own.
[[gnu::noinline]] void* operator new[](std::size_t bytes) { return operator new(bytes); }
[[gnu::noinline]] void* operator new[](std::size_t bytes, const std::nothrow_t& tag) noexcept {
  return operator new(bytes, tag);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}

int main(int argc, char** argv) { return kvspec::test::run(argc > 1 ? argv[1] : ""); }
