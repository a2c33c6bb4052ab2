// kill -9 between every two system calls of create, attach, close and reap, and at random instants.
//
// A program without the sanitizers: it defines the functions that cpp/shared_memory.cpp calls, to
// count them and to die before the n-th.  Each victim is a forked child that opens its own handles.
// After each death comes the next start, one create and one close, and then /dev/shm has the names
// and the bytes that it had.  Under root the folder is a tmpfs of its own.
//
//     killed_shared_memory LABEL SEED        prints "<kills> kills, /dev/shm is <private|shared>"
#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <dirent.h>
#include <exception>
#include <fcntl.h>
#include <functional>
#include <random>
#include <sched.h>
#include <string>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "kvspec/contract.hpp"
#include "kvspec/shared_memory.hpp"

namespace {

constexpr int kNever = 1 << 30;
int steps_left = kNever;
bool reserves_nothing = false;  // the memory runs out after the last look at how much there is

void step() noexcept {
  if (steps_left != kNever && --steps_left == 0) ::kill(::getpid(), SIGKILL);
}

template <class... Given>
long call(long number, Given... given) noexcept {
  step();
  return ::syscall(number, given...);
}

}  // namespace

extern "C" {
int shm_open(const char* name, int flags, mode_t mode) {
  const std::string path = std::string("/dev/shm/") + name;
  return static_cast<int>(
      call(SYS_openat, AT_FDCWD, path.c_str(), flags | O_CLOEXEC | O_NOFOLLOW, mode));
}
int shm_unlink(const char* name) {
  const std::string path = std::string("/dev/shm/") + name;
  return static_cast<int>(call(SYS_unlinkat, AT_FDCWD, path.c_str(), 0));
}
int flock(int fd, int kind) noexcept { return static_cast<int>(call(SYS_flock, fd, kind)); }
int posix_fallocate(int fd, off_t start, off_t bytes) {
  if (reserves_nothing) return ENOSPC;
  return call(SYS_fallocate, fd, 0, start, bytes) == 0 ? 0 : errno;
}
void* mmap(void* where, std::size_t bytes, int access, int flags, int fd, off_t start) noexcept {
  return reinterpret_cast<void*>(call(SYS_mmap, where, bytes, access, flags, fd, start));
}
int munmap(void* where, std::size_t bytes) noexcept {
  return static_cast<int>(call(SYS_munmap, where, bytes));
}
int close(int fd) { return static_cast<int>(call(SYS_close, fd)); }
int lstat(const char* path, struct stat* found) noexcept {
  return static_cast<int>(call(SYS_newfstatat, AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW));
}
int fstat(int fd, struct stat* found) noexcept {
  return static_cast<int>(call(SYS_newfstatat, fd, "", found, AT_EMPTY_PATH));
}
}

namespace {

using kvspec::SharedSegment;

std::string label;

[[noreturn]] void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

std::vector<std::string> names() {
  std::vector<std::string> found;
  DIR* folder = ::opendir("/dev/shm");
  while (const dirent* entry = ::readdir(folder)) {
    if (std::string(entry->d_name).starts_with("kvspec." + label + ".")) {
      found.emplace_back(entry->d_name);
    }
  }
  ::closedir(folder);
  std::sort(found.begin(), found.end());
  return found;
}

// A tmpfs that this process and its children alone see.
bool make_private() {
  return ::unshare(CLONE_NEWNS) == 0 &&
         ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::mount("none", "/dev/shm", "tmpfs", 0, "size=8m") == 0;
}

std::pair<unsigned long, unsigned long> room() {
  struct statvfs found{};
  ::statvfs("/dev/shm", &found);
  return {found.f_bavail, found.f_ffree};
}

void leave_dead(int count) {
  static int serial = 0;
  for (int i = 0; i < count; ++i) {
    const std::string name = "kvspec." + label + ".1.1." + std::to_string(serial++);
    const int fd = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
    if (fd < 0 || posix_fallocate(fd, 0, 5000) != 0) fail("cannot plant " + name);
    close(fd);
  }
}

// What a victim does: first unharmed, then until it is killed.
struct Scenario {
  const char* name;
  std::function<SharedSegment(const std::string& held)> first;
  std::function<void(SharedSegment& segment, const std::string& held)> then;
  bool among_dead = false;
};

template <class Action>
void expect_refusal(Action action) {
  try {
    action();
  } catch (const kvspec::ContractError&) {
    return;
  } catch (const kvspec::HostMemoryError&) {
    return;
  }
  std::_Exit(9);
}

std::vector<Scenario> scenarios(std::int64_t bytes) {
  const auto none = [](const std::string&) { return SharedSegment(); };
  const auto created = [bytes](const std::string&) { return SharedSegment::create(label, bytes); };
  const auto attached = [](const std::string& held) { return SharedSegment::attach(held); };
  const auto create = [bytes](SharedSegment& segment, const std::string&) {
    segment = SharedSegment::create(label, bytes, bytes > 1);
  };
  const auto close_it = [](SharedSegment& segment, const std::string&) { segment.close(); };
  return {
      {"create", none, create},
      {"create among the dead", none, create, true},
      {"create fails", none,
       [bytes](SharedSegment&, const std::string&) {
         reserves_nothing = true;
         expect_refusal([&] { SharedSegment::create(label, bytes); });
       }},
      {"attach", none,
       [](SharedSegment& segment, const std::string& held) {
         segment = SharedSegment::attach(held);
       }},
      {"attach to the dead", none,
       [](SharedSegment&, const std::string&) {
         for (const std::string& name : names()) {
           if (name.starts_with("kvspec." + label + ".1.1.")) {
             expect_refusal([&] { SharedSegment::attach(name); });
           }
         }
       },
       true},
      {"close, the last", created, close_it},
      {"close, not the last", attached, close_it},
      {"close, its creator", created,
       [](SharedSegment& segment, const std::string&) {
         SharedSegment other = SharedSegment::attach(segment.name());
         segment.close();
         other.close();
       }},
      {"reap", none, [](SharedSegment&, const std::string&) { SharedSegment::reap(); }, true},
  };
}

// Whether the victim was killed.
bool dies(const Scenario& scenario, int steps, const std::string& held) {
  const pid_t victim = ::fork();
  if (victim == 0) {
    ::alarm(20);
    try {
      SharedSegment segment = scenario.first(held);
      steps_left = steps;
      scenario.then(segment, held);
      steps_left = kNever;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s, step %d: %s\n", scenario.name, steps, error.what());
      std::_Exit(8);
    }
    std::_Exit(0);  // and nothing is closed
  }
  int status = 0;
  ::waitpid(victim, &status, 0);
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return true;
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) fail(scenario.name);
  return false;
}

// The next start leaves what was there before, names and bytes.
class Before {
 public:
  explicit Before(bool is_private) : is_private_(is_private), names_(names()), room_(room()) {}

  void require_same(const std::string& when) const {
    SharedSegment::create(label, 1).close();
    if (names() != names_) fail(when + ": names are left");
    if (is_private_ && room() != room_) fail(when + ": bytes are left");
  }

 private:
  bool is_private_;
  std::vector<std::string> names_;
  std::pair<unsigned long, unsigned long> room_;
};

int kill_at_each_step(std::int64_t bytes, bool is_private) {
  int kills = 0;
  SharedSegment held = SharedSegment::create(label, bytes);
  for (const Scenario& scenario : scenarios(bytes)) {
    const Before before(is_private);
    for (int steps = 1;; ++steps) {
      if (scenario.among_dead) leave_dead(2);
      const bool dead = dies(scenario, steps, held.name());
      before.require_same(std::string(scenario.name) + ", step " + std::to_string(steps));
      held.check();
      if (!dead) break;
      ++kills;
    }
  }
  held.close();
  if (!names().empty()) fail("the last did not take the name");
  return kills;
}

[[noreturn]] void live() {
  for (;;) {
    try {
      SharedSegment segment = SharedSegment::create(label, 20'000);
      for (const std::string& name : names()) {
        if (name != segment.name()) SharedSegment::attach(name).close();
      }
      SharedSegment other = SharedSegment::attach(segment.name());
      segment.close();
    } catch (const kvspec::ContractError&) {  // it went before it was attached to
    }
  }
}

int kill_at_random(unsigned seed, int rounds, bool is_private) {
  std::mt19937 random(seed);
  const Before before(is_private);
  for (int round = 0; round < rounds; ++round) {
    std::vector<pid_t> victims(3);
    for (pid_t& victim : victims) {
      victim = ::fork();
      if (victim == 0) live();
    }
    for (const pid_t victim : victims) {
      ::usleep(std::uniform_int_distribution<unsigned>(500, 10'000)(random));
      ::kill(victim, SIGKILL);
      ::waitpid(victim, nullptr, 0);
    }
    before.require_same("random round " + std::to_string(round));
  }
  return 3 * rounds;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  label = argv[1];
  const auto seed = static_cast<unsigned>(std::atoi(argv[2]));
  const bool is_private = make_private();
  int kills = 0;
  for (const std::int64_t bytes : {1, 300'000}) kills += kill_at_each_step(bytes, is_private);
  kills += kill_at_random(seed, 20, is_private);
  std::printf("%d kills, /dev/shm is %s\n", kills, is_private ? "private" : "shared");
  return 0;
}
