#include "kvspec/shared_memory.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <dirent.h>
#include <fcntl.h>
#include <memory>
#include <pthread.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <utility>

#include "kvspec/contract.hpp"

namespace kvspec {

namespace {

constexpr const char* kFolder = "/dev/shm";
constexpr std::string_view kPrefix = "kvspec.";
constexpr std::size_t kLabelLimit = 64;
constexpr mode_t kMode = S_IRUSR | S_IWUSR;

[[noreturn]] void fail(const char* clause, const std::string& what, int error) {
  throw HostMemoryError(clause, what + ": " + std::strerror(error));
}

// What is no fault of a name or of a segment: the process or the machine is out of something.
bool is_exhaustion(int error) noexcept {
  return error == EMFILE || error == ENFILE || error == ENOMEM || error == ENOSPC;
}

// -- names ----------------------------------------------------------------------------------------

bool is_label(std::string_view label) noexcept {
  const auto fits = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-';
  };
  return !label.empty() && label.size() <= kLabelLimit &&
         std::all_of(label.begin(), label.end(), fits);
}

bool is_number(std::string_view text) noexcept {
  const auto is_digit = [](char c) { return c >= '0' && c <= '9'; };
  return !text.empty() && text.size() <= 20 && std::all_of(text.begin(), text.end(), is_digit);
}

// Whether it is kvspec.<label>.<pid>.<start time>.<serial>.
bool is_name(std::string_view name) noexcept {
  if (!name.starts_with(kPrefix)) return false;
  name.remove_prefix(kPrefix.size());
  for (int part = 0; part < 4; ++part) {
    const std::size_t end = part < 3 ? name.find('.') : name.size();
    if (end == std::string_view::npos) return false;
    const std::string_view word = name.substr(0, end);
    if (part == 0 ? !is_label(word) : !is_number(word)) return false;
    name.remove_prefix(std::min(end + 1, name.size()));
  }
  return true;
}

// When this process was started, in ticks since the machine was: field 22 of /proc/self/stat.  The
// second field is a name in parentheses, which may have any character in it.
std::string start_time() {
  const int fd = ::open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("SHM-5", "/proc/self/stat cannot be read", errno);
  char text[1024];
  const ssize_t count = ::read(fd, text, sizeof(text));
  ::close(fd);
  const std::string_view stat(text, count < 0 ? 0 : static_cast<std::size_t>(count));
  std::size_t at = stat.rfind(')');
  for (int field = 2; field < 22 && at != std::string_view::npos; ++field) {
    at = stat.find(' ', at + 1);
  }
  if (at == std::string_view::npos) fail("SHM-5", "/proc/self/stat cannot be read", EIO);
  return std::string(stat.substr(at + 1, stat.find(' ', at + 1) - at - 1));
}

// Everything of a new name but its serial.
std::string stem(std::string_view label) {
  return std::string(kPrefix) + std::string(label) + "." + std::to_string(::getpid()) + "." +
         start_time() + ".";
}

std::uint64_t next_serial() noexcept {
  static std::atomic<std::uint64_t> next = 0;
  return next++;
}

// -- locks ----------------------------------------------------------------------------------------

// What a name leads to.  REQUIRES: is_name(name), which bounds its length.
bool find(const char* name, struct stat& found) noexcept {
  char path[256];
  std::snprintf(path, sizeof(path), "%s/%s", kFolder, name);
  return ::lstat(path, &found) == 0;
}

bool leads_to(const char* name, int fd) noexcept {
  struct stat there{}, here{};
  return find(name, there) && ::fstat(fd, &here) == 0 && there.st_ino == here.st_ino &&
         there.st_dev == here.st_dev;
}

bool share(int fd) noexcept { return ::flock(fd, LOCK_SH | LOCK_NB) == 0; }

// If nobody else has a lock on it the name goes, if it still leads there.  A shared lock of this
// description is lost first, so of two that close at once the kernel makes one the last.
enum class Removal { held_by_others, was_gone, removed };

Removal remove_if_alone(const char* name, int fd) noexcept {
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0) return Removal::held_by_others;
  if (!leads_to(name, fd) || ::shm_unlink(name) != 0) return Removal::was_gone;
  return Removal::removed;
}

// A descriptor that is closed when the scope is left.
class Descriptor {
 public:
  explicit Descriptor(int fd) noexcept : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int get() const noexcept { return fd_; }

 private:
  int fd_;
};

bool is_ours(int fd, struct stat& found) noexcept {
  return ::fstat(fd, &found) == 0 && S_ISREG(found.st_mode) && found.st_uid == ::geteuid();
}

std::vector<std::string> names() {
  const auto close_folder = [](DIR* folder) { ::closedir(folder); };
  const std::unique_ptr<DIR, decltype(close_folder)> folder(::opendir(kFolder), close_folder);
  if (!folder) fail("SHM-5", std::string(kFolder) + " cannot be listed", errno);
  std::vector<std::string> found;
  while (const dirent* entry = ::readdir(folder.get())) {
    if (is_name(entry->d_name)) found.emplace_back(entry->d_name);
  }
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

// -- opening --------------------------------------------------------------------------------------

SharedSegment SharedSegment::create(std::string_view label, std::int64_t bytes, bool populate) {
  if (!is_label(label)) {
    refuse("SHM-4", "label '" + std::string(label) + "' is not 1 to 64 of [A-Za-z0-9_-]");
  }
  if (bytes < 1) refuse("SHM-4", std::to_string(bytes) + " bytes were asked for, not 1 or more");
  reap();
  const std::string start = stem(label);
  SharedSegment segment;
  while (!segment.take_name(start + std::to_string(next_serial()))) continue;
  segment.reserve(bytes);
  segment.map(bytes, populate ? MAP_SHARED | MAP_POPULATE : MAP_SHARED);
  return segment;
}

// False, with nothing changed, if the name is somebody's, or if it was taken for dead and removed
// before it was locked.
bool SharedSegment::take_name(std::string name) {
  const int fd = ::shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR, kMode);
  if (fd < 0 && errno == EEXIST) return false;
  if (fd < 0) fail("SHM-5", "no segment can be made in " + std::string(kFolder), errno);
  if (!share(fd) || !leads_to(name.c_str(), fd)) {
    ::close(fd);
    return false;
  }
  fd_ = fd;
  owner_ = ::getpid();
  name_ = std::move(name);
  return true;
}

// All of the size or, with an error, nothing of it.  A signal would make the kernel give back what
// it has and start again, so signals wait.
void SharedSegment::reserve(std::int64_t bytes) {
  const std::string asked = std::to_string(bytes) + " bytes were asked for";
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur < static_cast<rlim_t>(bytes)) {
    throw HostMemoryError("SHM-5", asked + ", a file may have " + std::to_string(limit.rlim_cur));
  }
  struct statvfs folder{};
  if (::fstatvfs(fd_, &folder) != 0) fail("SHM-5", asked, errno);
  const auto free = static_cast<std::uint64_t>(folder.f_bavail) * folder.f_frsize;
  const bool limited = folder.f_blocks > 0;  // a tmpfs may have no limit
  int error = limited && free < static_cast<std::uint64_t>(bytes) ? ENOSPC : 0;
  if (error == 0) {
    sigset_t all{}, before{};
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_BLOCK, &all, &before);
    error = ::posix_fallocate(fd_, 0, bytes);
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  if (error == 0) return;
  fail("SHM-5", asked + ", " + std::to_string(free) + " are free in " + kFolder, error);
}

void SharedSegment::map(std::int64_t bytes, int flags) {
  const auto size = static_cast<std::size_t>(bytes);
  void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, fd_, 0);
  if (data == MAP_FAILED) {
    fail("SHM-5", std::to_string(bytes) + " bytes of " + name_ + " cannot be mapped", errno);
  }
  data_ = static_cast<std::byte*>(data);
  bytes_ = bytes;
}

SharedSegment SharedSegment::attach(const std::string& name) {
  if (!is_name(name)) {
    refuse("SHM-7", "'" + name + "' is not kvspec.<label>.<pid>.<start time>.<serial>");
  }
  SharedSegment segment;
  segment.require_alive(name);
  struct stat found{};
  // Size 0: its creator has not reserved it yet.  The handle is closed as any other, because the
  // creator may have gone meanwhile, and left the name to it.
  if (::fstat(segment.fd_, &found) != 0 || found.st_size == 0) {
    refuse("SHM-7", "segment " + name + " is not complete");
  }
  segment.map(found.st_size, MAP_SHARED);
  return segment;
}

void SharedSegment::require_alive(const std::string& name) {
  const int fd = ::shm_open(name.c_str(), O_RDWR | O_NONBLOCK, 0);
  if (fd < 0 && is_exhaustion(errno)) fail("SHM-5", "segment " + name + " cannot be opened", errno);
  if (fd < 0) refuse("SHM-7", "segment " + name + ": " + std::strerror(errno));
  fd_ = fd;
  struct stat found{};
  const char* fault = nullptr;
  if (!is_ours(fd, found)) {
    fault = " is no file of this user";
  } else if (remove_if_alone(name.c_str(), fd) != Removal::held_by_others || !share(fd) ||
             !leads_to(name.c_str(), fd)) {
    fault = " is held by nobody any more";
  }
  if (fault != nullptr) {
    forget();
    refuse("SHM-7", "segment " + name + fault);
  }
  owner_ = ::getpid();
  name_ = name;
}

std::vector<Reaped> SharedSegment::reap() {
  std::vector<Reaped> reaped;
  for (std::string& name : names()) {
    const Descriptor segment(::shm_open(name.c_str(), O_RDONLY | O_NONBLOCK, 0));
    if (segment.get() < 0 && is_exhaustion(errno)) fail("SHM-5", name + " cannot be opened", errno);
    struct stat found{};
    if (segment.get() < 0 || !is_ours(segment.get(), found)) continue;
    if (remove_if_alone(name.c_str(), segment.get()) != Removal::removed) continue;
    reaped.push_back({std::move(name), found.st_size});
  }
  return reaped;
}

// -- a handle -------------------------------------------------------------------------------------

SharedSegment::SharedSegment(SharedSegment&& other) noexcept
    : name_(std::move(other.name_)),
      data_(other.data_),
      bytes_(other.bytes_),
      fd_(other.fd_),
      owner_(other.owner_) {
  other.data_ = nullptr;
  other.fd_ = -1;
}

SharedSegment& SharedSegment::operator=(SharedSegment&& other) noexcept {
  if (this == &other) return *this;
  close();
  name_ = std::move(other.name_);
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = other.bytes_;
  fd_ = std::exchange(other.fd_, -1);
  owner_ = other.owner_;
  return *this;
}

bool SharedSegment::owned() const noexcept { return owner_ == ::getpid(); }

bool SharedSegment::linked() const noexcept {
  struct stat found{};
  if (closed()) return !name_.empty() && find(name_.c_str(), found);
  return leads_to(name_.c_str(), fd_);
}

void SharedSegment::check() const {
  if (closed()) return;
  struct stat found{};
  if (!linked()) refuse("SHM-14", "segment " + name_ + " is held, and its name is gone");
  if (::fstat(fd_, &found) != 0 || found.st_size != bytes_) {
    refuse("SHM-2", "segment " + name_ + " has " + std::to_string(found.st_size) + " bytes, not " +
                        std::to_string(bytes_));
  }
}

void SharedSegment::close() noexcept {
  if (closed()) return;
  if (owned()) remove_if_alone(name_.c_str(), fd_);
  if (data_ != nullptr) ::munmap(data_, static_cast<std::size_t>(bytes_));
  forget();
}

void SharedSegment::forget() noexcept {
  ::close(fd_);
  fd_ = -1;
  data_ = nullptr;
}

}  // namespace kvspec
