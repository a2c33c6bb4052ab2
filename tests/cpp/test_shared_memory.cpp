// Shared memory by itself: handles that move and close, failures half way, memory that runs out.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <filesystem>
#include <string>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "check.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/shared_memory.hpp"

namespace kvspec {
namespace {

using Names = std::vector<std::string>;

const std::string kLabel = "cpp-" + std::to_string(::getpid());

Names names() {
  Names found;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    const std::string name = entry.path().filename();
    if (name.starts_with("kvspec." + kLabel + ".")) found.push_back(name);
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::ptrdiff_t descriptors() {
  const std::filesystem::directory_iterator folder("/proc/self/fd");
  return std::distance(begin(folder), end(folder));
}

// A segment of another process, which has the lock on it until this is gone.
class Planted {
 public:
  explicit Planted(int serial, int lock = LOCK_SH, off_t bytes = 100)
      : name("kvspec." + kLabel + ".1.1." + std::to_string(serial)),
        fd_(::open(path().c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600)) {
    CHECK(fd_ >= 0 && ::flock(fd_, lock | LOCK_NB) == 0 && ::ftruncate(fd_, bytes) == 0);
  }
  ~Planted() {
    ::close(fd_);
    ::unlink(path().c_str());
  }
  Planted(const Planted&) = delete;
  Planted& operator=(const Planted&) = delete;

  void die() const { ::flock(fd_, LOCK_UN); }

  const std::string name;

 private:
  std::string path() const { return "/dev/shm/" + name; }

  int fd_;
};

// The status of a forked child that does it.
template <class Action>
int in_child(Action action) {
  const pid_t child = ::fork();
  if (child == 0) {
    int status = 1;
    try {
      status = action() ? 0 : 2;
    } catch (const std::exception&) {
    }
    std::_Exit(status);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return status;
}

TEST(one_memory_until_the_last_is_closed) {
  const std::ptrdiff_t before = descriptors();
  SharedSegment first = SharedSegment::create(kLabel, 5000, true);
  SharedSegment second = SharedSegment::attach(first.name());
  CHECK(first.bytes() == 5000 && second.span().size() == 5000 && first.data() != second.data());
  CHECK(std::all_of(first.span().begin(), first.span().end(),
                    [](std::byte value) { return value == std::byte{0}; }));
  second.data()[4999] = std::byte{7};
  CHECK(first.data()[4999] == std::byte{7});
  struct stat found{};
  CHECK(::fstat(first.fd(), &found) == 0 && found.st_size == 5000 && found.st_blocks * 512 >= 5000);
  first.close();
  CHECK(first.closed() && first.linked() && first.data() == nullptr && first.fd() == -1);
  CHECK(names() == Names{second.name()});
  second.close();
  second.close();
  CHECK(names().empty() && !second.linked() && descriptors() == before);
}

TEST(a_handle_is_moved) {
  SharedSegment first = SharedSegment::create(kLabel, 100);
  std::byte* const data = first.data();
  SharedSegment second = std::move(first);
  CHECK(second.data() == data && names() == Names{second.name()});
  SharedSegment third = SharedSegment::create(kLabel, 100);
  const std::string gone = third.name();
  third = std::move(second);
  CHECK(third.data() == data && third.name() != gone && names() == Names{third.name()});
  SharedSegment& same = third;
  third = std::move(same);
  CHECK(third.data() == data && third.linked());
  SharedSegment none;
  none.close();
  none.check();
  CHECK(none.closed() && !none.linked());
  third = std::move(none);
  CHECK(names().empty());
}

TEST(what_is_refused_leaves_nothing) {
  const std::ptrdiff_t before = descriptors();
  const auto refused = [](const char* start, auto action) {
    return test::throws<ContractError>(start, action);
  };
  CHECK(refused("SHM-4: label", [] { SharedSegment::create("a.b", 1); }));
  CHECK(refused("SHM-4: label", [] { SharedSegment::create("", 1); }));
  CHECK(refused("SHM-4: label", [] { SharedSegment::create(std::string(65, 'a'), 1); }));
  CHECK(refused("SHM-4: 0", [] { SharedSegment::create(kLabel, 0); }));
  for (const char* name : {"", "kvspec.a.1.1", "kvspec.a.1.1.x", "/kvspec.a.1.1.1", "kvspec.a."}) {
    CHECK(refused("SHM-7: '", [&] { SharedSegment::attach(name); }));
  }
  const Planted incomplete(1, LOCK_SH, 0), removed(2, LOCK_EX), dead(3);
  CHECK(refused("SHM-7: segment", [&] { SharedSegment::attach(incomplete.name); }));
  CHECK(refused("SHM-7: segment", [&] { SharedSegment::attach(removed.name); }));
  dead.die();
  CHECK(refused("SHM-7: segment", [&] { SharedSegment::attach(dead.name); }));
  const Names left{incomplete.name, removed.name};
  CHECK(names() == left && descriptors() == before + 3);
}

TEST(what_the_machine_has_not_leaves_nothing) {
  const auto lacks = [](std::int64_t bytes) {
    return test::throws<HostMemoryError>("SHM-5: ", [&] { SharedSegment::create(kLabel, bytes); });
  };
  const std::ptrdiff_t before = descriptors();
  CHECK(lacks(std::int64_t{1} << 50) && lacks(INT64_MAX));
  CHECK(in_child([&] {
          const rlimit limit{4096, RLIM_INFINITY};
          return ::setrlimit(RLIMIT_FSIZE, &limit) == 0 && lacks(4097) && names().empty();
        }) == 0);
  SharedSegment held = SharedSegment::create(kLabel, 100);
  CHECK(in_child([&] {
          const rlimit limit{40, 40};
          if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) return false;
          int last = 0, refused = 0;
          for (int fd = ::dup(1); fd >= 0; fd = ::dup(1)) last = fd;
          for (; last > 36; ::close(last--)) {
            if (lacks(100)) ++refused;
            if (test::throws<HostMemoryError>("SHM-5: ", [&] {
                  SharedSegment::attach(held.name());
                })) {
              ++refused;
            }
          }
          ::close(last);
          return refused > 1 && names() == Names{held.name()};
        }) == 0);
  held.close();
  CHECK(names().empty() && descriptors() == before);
}

TEST(memory_that_runs_out_leaves_nothing) {
  const std::ptrdiff_t before = descriptors();
  const auto none = [] { return 0; };
  const auto nothing = [&](int) { CHECK(names().empty() && descriptors() == before); };
  CHECK(test::fail_each_allocation(
            none, [](int) { SharedSegment::create(kLabel, 100); }, nothing) > 0);
  const SharedSegment held = SharedSegment::create(kLabel, 100);
  test::fail_each_allocation(
      none, [&](int) { SharedSegment::attach(held.name()); },
      [&](int) { CHECK(names() == Names{held.name()} && descriptors() == before + 1); });
  const Planted dead(1);
  dead.die();
  test::fail_each_allocation(
      none, [&](int) { SharedSegment::reap(); },
      [&](int) { CHECK(descriptors() == before + 2 && held.linked()); });
}

TEST(the_dead_are_reaped_and_the_living_are_not) {
  const SharedSegment held = SharedSegment::create(kLabel, 100);
  const Planted living(1), dead(2);
  dead.die();
  for (const Reaped& reaped : SharedSegment::reap()) {
    CHECK(reaped.name != held.name() && reaped.name != living.name);
    CHECK(reaped.name != dead.name || reaped.bytes == 100);
  }
  Names left{held.name(), living.name};
  std::sort(left.begin(), left.end());
  CHECK(names() == left);
  held.check();
}

TEST(a_forked_child_is_no_owner) {
  SharedSegment held = SharedSegment::create(kLabel, 100);
  CHECK(in_child([&] {
          const bool inherited = !held.owned() && held.linked();
          held.close();
          return inherited && held.closed() && held.linked();
        }) == 0);
  CHECK(in_child([&] {
          const SharedSegment own = SharedSegment::attach(held.name());
          SharedSegment::reap();
          return own.owned() && own.linked();
        }) == 0);
  held.check();
  held.close();
  CHECK(names().empty());
}

TEST(check_names_what_is_wrong) {
  SharedSegment held = SharedSegment::create(kLabel, 100);
  CHECK(::ftruncate(held.fd(), 101) == 0);
  CHECK(test::throws<ContractError>("SHM-2: ", [&] { held.check(); }));
  CHECK(::ftruncate(held.fd(), 100) == 0);
  held.check();
  CHECK(::unlink(("/dev/shm/" + held.name()).c_str()) == 0);
  CHECK(test::throws<ContractError>("SHM-14: ", [&] { held.check(); }));
  held.close();
  held.check();
}

}  // namespace
}  // namespace kvspec
