// What glibc's malloc does in a process that has done nothing yet, as one line of JSON: where it
// puts a chunk, when that changes, what has pages, what goes back (CHAIN-14 to CHAIN-17).
// Each question is put to a fork, so that no answer changes the state of the next.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <malloc.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace {

constexpr std::size_t kib = 1024;
constexpr std::size_t mib = 1024 * kib;
constexpr std::size_t default_threshold = 128 * kib;
constexpr std::size_t largest_threshold = 32 * mib;
const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));

// Through a pointer, so that the compiler knows nothing of it and leaves none out.
void* (*volatile take)(std::size_t) = malloc;
void (*volatile give)(void*) = free;

std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// The chunk says so itself: bit 1 of the size that stands before it.
bool has_own_mapping(const void* pointer) {
  return (static_cast<const std::size_t*>(pointer)[-1] & 2) != 0;
}

// Pages of [at, at + bytes) that are mapped now; -1 where nothing is mapped.
long resident_pages(std::uintptr_t at, std::size_t bytes) {
  const std::uintptr_t first = at / page * page;
  const std::size_t pages = (at + bytes - first + page - 1) / page;
  static unsigned char seen[16 * kib];
  if (pages > sizeof seen || mincore(reinterpret_cast<void*>(first), pages * page, seen) != 0) {
    return -1;
  }
  long count = 0;
  for (std::size_t i = 0; i < pages; ++i) count += seen[i] & 1;
  return count;
}

void touch(void* pointer, std::size_t bytes) {
  auto* first = static_cast<volatile unsigned char*>(pointer);
  for (std::size_t i = 0; i < bytes; i += page) first[i] = 1;
  first[bytes - 1] = 1;
}

template <class Question>
bool asked(Question question) {
  const pid_t child = fork();
  if (child == 0) _exit(question() ? 1 : 0);
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
         WEXITSTATUS(status) == 1;
}

// The smallest request that gets a mapping of its own, as things stand.
std::size_t smallest_mapped() {
  std::size_t heap = 64 * kib, mapped = 64 * mib;
  while (mapped - heap > 1) {
    const std::size_t middle = (heap + mapped) / 2;
    (asked([=] { return has_own_mapping(take(middle)); }) ? mapped : heap) = middle;
  }
  return mapped;
}

template <class Work>
void in_a_fork(Work work) {
  std::fflush(stdout);
  asked([&] {
    work();
    std::fflush(stdout);
    return true;
  });
}

void tell(const char* name, long long value) { std::printf(", \"%s\": %lld", name, value); }
void tell_size(const char* name, std::size_t value) { tell(name, static_cast<long long>(value)); }

std::size_t smallest_after_free(std::size_t request) {
  give(take(request));
  return smallest_mapped();
}

void threshold() {
  tell_size("smallest_mapped", smallest_mapped());
  in_a_fork([] { tell_size("smallest_mapped_after_free_of_1MiB", smallest_after_free(mib)); });
  in_a_fork([] {
    tell_size("smallest_mapped_after_free_of_32MiB_less_a_page",
              smallest_after_free(largest_threshold - page - 64));
  });
  in_a_fork([] {
    tell_size("smallest_mapped_after_free_of_32MiB", smallest_after_free(largest_threshold));
  });
  in_a_fork([] {
    mallopt(M_MMAP_THRESHOLD, static_cast<int>(default_threshold));
    tell_size("smallest_mapped_fixed_after_free_of_1MiB", smallest_after_free(mib));
  });
}

void below() {
  const std::uintptr_t before = address(sbrk(0));
  const std::size_t request = 120 * kib;
  void* first = take(request);  // takes what the heap starts with
  void* second = take(request);
  const std::uintptr_t after = address(sbrk(0));
  tell_size("heap_request", request);
  tell_size("heap_break_grew", after - before);
  tell("heap_lies_below_break", address(second) < after && address(second) + request <= after);
  tell("heap_own_mapping", has_own_mapping(first) || has_own_mapping(second));
  const std::uintptr_t inner = (address(second) + page - 1) / page * page;
  const std::size_t span = (address(second) + request) / page * page - inner;
  tell_size("heap_inner_pages", span / page);
  tell("heap_resident_pages", resident_pages(inner, span));
  touch(second, request);
  tell("heap_resident_pages_touched", resident_pages(inner, span));
}

void above() {
  const std::uintptr_t before = address(sbrk(0));
  const struct mallinfo2 was = mallinfo2();
  const std::size_t request = mib;
  void* pointer = take(request);
  const struct mallinfo2 is = mallinfo2();
  tell_size("mapped_request", request);
  tell_size("mapped_break_grew", address(sbrk(0)) - before);
  tell_size("mapped_chunks", is.hblks - was.hblks);
  tell_size("mapped_bytes", is.hblkhd - was.hblkhd);
  tell_size("mapped_offset", address(pointer) % page);
  tell("mapped_resident_pages", resident_pages(address(pointer), request));
  touch(pointer, request);
  tell("mapped_resident_pages_touched", resident_pages(address(pointer), request));
  const std::uintptr_t at = address(pointer);
  give(pointer);
  tell("mapped_after_free", resident_pages(at, request));
}

// How far the break falls when eight chunks of 64 KiB are freed.
long long falls() {
  std::vector<void*> chunks;
  for (int i = 0; i < 8; ++i) chunks.push_back(take(64 * kib));
  const std::uintptr_t full = address(sbrk(0));
  while (!chunks.empty()) {
    give(chunks.back());
    chunks.pop_back();
  }
  return static_cast<long long>(full - address(sbrk(0)));
}

void trimming() {
  in_a_fork([] { tell("break_fell_after_free_of_512KiB", falls()); });
  in_a_fork([] {
    const std::uintptr_t heap_end = address(sbrk(0));
    mallopt(M_TOP_PAD, 0);  // the heap grows by what is asked for
    while (address(sbrk(0)) == heap_end) take(4 * kib);
    void* pointer = take(64 * kib);
    const std::uintptr_t full = address(sbrk(0));
    give(pointer);
    tell_size("break_fell_after_free_of_64KiB", full - address(sbrk(0)));
  });
  in_a_fork([] {
    mallopt(M_TRIM_THRESHOLD, static_cast<int>(512 * mib));
    tell("break_fell_with_large_trim_threshold", falls());
    // The heap has room now, so a request above the threshold is served from it.
    tell("large_request_is_mapped_though_heap_has_room", has_own_mapping(take(200 * kib)));
  });
}

void moving_the_break() {
  auto* start = static_cast<unsigned char*>(sbrk(static_cast<std::intptr_t>(mib)));
  const std::uintptr_t first = (address(start) + page - 1) / page * page;
  const std::size_t span = mib - page;
  tell_size("brk_bytes", span);
  tell("brk_resident_pages", resident_pages(first, span));
  touch(reinterpret_cast<void*>(first), 10 * page);
  tell("brk_resident_pages_after_ten_touched", resident_pages(first, span));
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // a buffer would be the first chunk
  std::printf("{\"page\": %zu", page);
  threshold();
  in_a_fork(below);
  in_a_fork(above);
  trimming();
  in_a_fork(moving_the_break);
  std::printf("}\n");
  return 0;
}
