// A library that is loaded before libc and writes down who asks for memory, with what result
// (CHAIN-3). It allocates nothing, calls nothing that it stands before, and is silent outside the
// marks. No symbol of libstdc++ is used, so it fits before any program.

#include <cerrno>
#include <cstdarg>
#include <ctime>
#include <dlfcn.h>
#include <fcntl.h>
#include <initializer_list>
#include <link.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <type_traits>
#include <unistd.h>
#include <unwind.h>

#include "ring.hpp"

#define KVSPEC_EXPORT extern "C" __attribute__((visibility("default")))

namespace kvspec::interposer {
namespace {

constexpr std::size_t boot_bytes = 8192;
constexpr int marker = 0x4b565350;  // an option that prctl refuses: visible to strace

Header* ring = nullptr;
std::uint32_t phase = 0;
std::uint64_t page_bytes = 4096;
unsigned char residency[65536];
alignas(16) unsigned char boot[boot_bytes];
std::size_t boot_used = 0;
thread_local bool inside __attribute__((tls_model("initial-exec"))) = false;

std::uint64_t now(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * 1'000'000'000 +
         static_cast<std::uint64_t>(time.tv_nsec);
}

Record* claim() {
  const std::uint64_t slot = __atomic_fetch_add(&ring->next, 1, __ATOMIC_RELAXED);
  if (slot >= ring->capacity) return nullptr;
  return reinterpret_cast<Record*>(ring + 1) + slot;
}

struct Walk {
  Record* record;
  std::uint64_t caller;
  bool found;
};

_Unwind_Reason_Code step(_Unwind_Context* context, void* state) {
  auto* walk = static_cast<Walk*>(state);
  const std::uint64_t at = _Unwind_GetIP(context);
  walk->found = walk->found || at == walk->caller;
  if (walk->found) walk->record->frames[walk->record->frame_count++] = at;
  return walk->record->frame_count < frame_slots ? _URC_NO_REASON : _URC_END_OF_STACK;
}

void copy_text(Record* record, const char* text) {
  std::size_t i = 0;
  for (; text != nullptr && text[i] != '\0' && i + 1 < text_bytes; ++i) record->text[i] = text[i];
  record->text[i] = '\0';
}

template <class T>
std::uint64_t word(T value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<std::uint64_t>(value);
  } else {
    return static_cast<std::uint64_t>(value);
  }
}

struct Call {
  Function function;
  void* caller;
  const char* text = nullptr;
};

// Does what was asked for, and writes it down if a phase is on and nobody is writing already.
template <class Do, class... Args>
auto noted(const Call& call, Do&& work, Args... args) {
  if (phase == 0 || inside || ring == nullptr) return work();
  inside = true;
  const std::uint64_t begin = now(CLOCK_MONOTONIC);
  inside = false;
  auto result = work();
  const int error = errno;
  inside = true;
  const std::uint64_t end = now(CLOCK_MONOTONIC);
  if (Record* record = claim(); record != nullptr) {
    record->begin_ns = begin;
    record->end_ns = end;
    record->function = call.function;
    record->phase = phase;
    record->thread = static_cast<std::uint32_t>(syscall(SYS_gettid));
    const std::uint64_t values[] = {word(args)..., 0};
    for (std::size_t i = 0; i < sizeof...(args); ++i) record->values[i] = values[i];
    record->result = word(result);
    record->error = error;
    copy_text(record, call.text);
    Walk walk{record, word(call.caller), false};
    _Unwind_Backtrace(step, &walk);
    if (record->frame_count == 0) record->frames[record->frame_count++] = word(call.caller);
    record->entry = Entry::call;  // last: what has no entry was not finished
  }
  inside = false;
  errno = error;
  return result;
}

// The function behind ours: libc's, or that of another library that was loaded before libc.
template <class F>
F* real(F*& cached, const char* name) {
  if (cached == nullptr) cached = reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
  return cached;
}

// What dlsym itself asks for while the first functions are being looked up.
void* boot_alloc(std::size_t bytes) {
  const std::size_t rounded = (bytes + 15) / 16 * 16;
  const std::size_t at = __atomic_fetch_add(&boot_used, rounded, __ATOMIC_RELAXED);
  return at + rounded <= boot_bytes ? boot + at : nullptr;
}

bool is_boot(const void* pointer) { return pointer >= boot && pointer < boot + boot_bytes; }

bool resolving = false;
void* (*real_malloc)(std::size_t) = nullptr;
void* (*real_calloc)(std::size_t, std::size_t) = nullptr;
void* (*real_realloc)(void*, std::size_t) = nullptr;
void* (*real_aligned_alloc)(std::size_t, std::size_t) = nullptr;
int (*real_posix_memalign)(void**, std::size_t, std::size_t) = nullptr;
void (*real_free)(void*) = nullptr;

void resolve() {
  if (resolving) return;
  resolving = true;
  real(real_calloc, "calloc");
  real(real_realloc, "realloc");
  real(real_free, "free");
  real(real_aligned_alloc, "aligned_alloc");
  real(real_posix_memalign, "posix_memalign");
  real(real_malloc, "malloc");
  resolving = false;
}

// A cudart that was not loaded globally is found by its name, if it is loaded at all.
template <class F>
F* of_cuda(F*& cached, const char* name) {
  if (real(cached, name) != nullptr) return cached;
  for (const char* library : {"libcudart.so.12", "libcudart.so.13", "libcudart.so.11.0"}) {
    void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (handle != nullptr) cached = reinterpret_cast<F*>(dlsym(handle, name));
    if (cached != nullptr) break;
  }
  return cached;
}

// Virtual and resident bytes, as /proc/self/statm has them.
void statm(std::uint64_t* size, std::uint64_t* resident) {
  *size = *resident = 0;
  const int file = static_cast<int>(syscall(SYS_openat, AT_FDCWD, "/proc/self/statm", O_RDONLY));
  char text[128];
  const long got = syscall(SYS_read, file, text, sizeof text);
  syscall(SYS_close, file);
  std::uint64_t* const fields[] = {size, resident};
  long i = 0;
  for (std::uint64_t* field : fields) {
    while (i < got && text[i] == ' ') ++i;
    for (; i < got && text[i] >= '0' && text[i] <= '9'; ++i) {
      *field = *field * 10 + static_cast<std::uint64_t>(text[i] - '0');
    }
    *field *= page_bytes;
  }
}

std::uint64_t resident_bytes(std::uint64_t address, std::uint64_t bytes) {
  const std::uint64_t first = address / page_bytes * page_bytes;
  const std::uint64_t end = (address + bytes + page_bytes - 1) / page_bytes * page_bytes;
  const std::uint64_t span = sizeof residency * page_bytes;
  std::uint64_t pages = 0;
  for (std::uint64_t at = first; at < end; at += span) {
    const std::uint64_t length = end - at < span ? end - at : span;
    if (syscall(SYS_mincore, at, length, residency) != 0) return ~std::uint64_t{0};
    for (std::uint64_t i = 0; i < length / page_bytes; ++i) pages += residency[i] & 1;
  }
  return pages * page_bytes;
}

void note_mark(std::uint32_t next, bool begins) {
  Record* record = claim();
  if (record == nullptr) return;
  rusage use{};
  getrusage(RUSAGE_SELF, &use);
  record->values[0] = static_cast<std::uint64_t>(use.ru_minflt);
  record->values[1] = static_cast<std::uint64_t>(use.ru_majflt);
  record->values[2] = word(sbrk(0));
  statm(&record->values[4], &record->values[5]);
  record->result = begins ? 1 : 0;
  record->phase = next;
  record->thread = static_cast<std::uint32_t>(syscall(SYS_gettid));
  record->values[3] = now(CLOCK_REALTIME);  // both clocks at once: strace has this one
  record->begin_ns = record->end_ns = now(CLOCK_MONOTONIC);
  record->entry = Entry::mark;
}

__attribute__((constructor)) void attach() {
  resolve();
  page_bytes = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  const char* given = nullptr;
  constexpr char name[] = "KVSPEC_CHAIN_RING=";
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    std::size_t i = 0;
    while (i + 1 < sizeof name && (*entry)[i] == name[i]) ++i;
    if (i + 1 == sizeof name) given = *entry + i;
  }
  int file = 0;
  std::size_t bytes = 0;
  for (; given != nullptr && *given >= '0' && *given <= '9'; ++given) {
    file = file * 10 + (*given - '0');
  }
  if (given == nullptr || *given++ != ',') return;
  for (; *given >= '0' && *given <= '9'; ++given) {
    bytes = bytes * 10 + static_cast<std::size_t>(*given - '0');
  }
  const long at = syscall(SYS_mmap, nullptr, bytes, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_POPULATE, file, 0);
  if (at < 0 && at > -4096) return;
  auto* header = reinterpret_cast<Header*>(at);
  if (header->magic == magic && header->record_bytes == sizeof(Record)) ring = header;
}

}  // namespace
}  // namespace kvspec::interposer

using namespace kvspec::interposer;

#define CALL(function) \
  Call { Function::function, __builtin_return_address(0) }
#define CALL_NAMING(function, text) \
  Call { Function::function, __builtin_return_address(0), text }

// ---- for the process that is observed ----

// Whether there is a ring to write to.
KVSPEC_EXPORT int kvspec_chain_attached() { return ring != nullptr; }

// A phase begins. What its mark costs lies before it.
KVSPEC_EXPORT void kvspec_chain_begin(std::uint32_t next) {
  inside = true;
  if (ring != nullptr) note_mark(next, true);
  prctl(marker, next, 1UL, 0UL, 0UL);
  phase = next;
  inside = false;
}

// The phase is over. What its mark costs lies behind it.
KVSPEC_EXPORT void kvspec_chain_end() {
  inside = true;
  const std::uint32_t over = phase;
  phase = 0;
  prctl(marker, over, 0UL, 0UL, 0UL);
  if (ring != nullptr) note_mark(over, false);
  inside = false;
}

// Touch [start, start + length) of [address, address + bytes): `how` 0 writes a byte to each page,
// 1 writes all, 2 reads a byte of each page. The touching alone lies between the marks.
KVSPEC_EXPORT void kvspec_chain_touch(std::uint64_t address, std::uint64_t bytes,
                                      std::uint64_t start, std::uint64_t length, int how) {
  constexpr std::uint32_t touching = 2;
  rusage before{}, after{};
  auto* const first = reinterpret_cast<volatile unsigned char*>(address);
  const std::uint64_t stride = how == 1 ? 1 : page_bytes;
  inside = true;
  prctl(marker, touching, 1UL, 0UL, 0UL);
  getrusage(RUSAGE_SELF, &before);
  const std::uint64_t begin = now(CLOCK_MONOTONIC);
  for (std::uint64_t at = start; at < start + length; at += stride) {
    if (how == 2) {
      (void)first[at];
    } else {
      first[at] = 1;
    }
  }
  const std::uint64_t end = now(CLOCK_MONOTONIC);
  getrusage(RUSAGE_SELF, &after);
  prctl(marker, touching, 0UL, 0UL, 0UL);
  inside = false;
  Record* record = ring != nullptr ? claim() : nullptr;
  if (record == nullptr) return;
  record->begin_ns = begin;
  record->end_ns = end;
  record->values[0] = static_cast<std::uint64_t>(after.ru_minflt - before.ru_minflt);
  record->values[1] = static_cast<std::uint64_t>(after.ru_majflt - before.ru_majflt);
  statm(&record->values[2], &record->values[3]);
  record->values[4] = resident_bytes(address, bytes);
  record->result = start + length;
  record->phase = touching;
  record->entry = Entry::step;
}

// Which library and symbol hold an address: the path and name, and the offset into the symbol,
// or into the library where no exported symbol covers it (then *symbol is null).
KVSPEC_EXPORT std::uint64_t kvspec_chain_name(std::uint64_t at, const char** library,
                                              const char** symbol) {
  Dl_info found{};
  const ElfW(Sym)* entry = nullptr;
  *library = *symbol = nullptr;
  auto** extra = reinterpret_cast<void**>(const_cast<ElfW(Sym)**>(&entry));
  if (dladdr1(reinterpret_cast<void*>(at - 1), &found, extra, RTLD_DL_SYMENT) == 0) return 0;
  *library = found.dli_fname;
  const std::uint64_t start = word(found.dli_saddr);
  if (found.dli_sname == nullptr || entry == nullptr || at - 1 >= start + entry->st_size) {
    return at - word(found.dli_fbase);
  }
  *symbol = found.dli_sname;
  return at - start;
}

// ---- libc ----

KVSPEC_EXPORT void* malloc(std::size_t size) noexcept {
  if (real_malloc == nullptr) resolve();
  if (real_malloc == nullptr) return boot_alloc(size);
  return noted(CALL(malloc_), [=] { return real_malloc(size); }, size);
}

KVSPEC_EXPORT void* calloc(std::size_t count, std::size_t size) noexcept {
  if (real_calloc == nullptr) resolve();
  if (real_calloc == nullptr) return boot_alloc(count * size);
  return noted(CALL(calloc_), [=] { return real_calloc(count, size); }, count, size);
}

KVSPEC_EXPORT void* realloc(void* old, std::size_t size) noexcept {
  if (real_realloc == nullptr) resolve();
  if (is_boot(old)) {
    void* moved = malloc(size);
    const auto* from = static_cast<const unsigned char*>(old);
    const auto left = static_cast<std::size_t>(boot + boot_bytes - from);
    auto* to = static_cast<volatile unsigned char*>(moved);
    for (std::size_t i = 0; moved != nullptr && i < size && i < left; ++i) {
      to[i] = from[i];
    }
    return moved;
  }
  return noted(CALL(realloc_), [=] { return real_realloc(old, size); }, old, size);
}

KVSPEC_EXPORT void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  if (real_aligned_alloc == nullptr) resolve();
  return noted(CALL(aligned_alloc_), [=] { return real_aligned_alloc(alignment, size); }, alignment,
               size);
}

// Its result is written down as that of the others: the pointer, or null and an error.
KVSPEC_EXPORT int posix_memalign(void** where, std::size_t alignment, std::size_t size) noexcept {
  if (real_posix_memalign == nullptr) resolve();
  int refused = 0;
  const int error = errno;
  const auto work = [&]() -> void* {
    void* made = nullptr;
    refused = real_posix_memalign(&made, alignment, size);
    errno = refused;
    return made;
  };
  void* made = noted(CALL(posix_memalign_), work, alignment, size);
  errno = error;
  if (refused == 0) *where = made;
  return refused;
}

KVSPEC_EXPORT void free(void* pointer) noexcept {
  if (pointer == nullptr || is_boot(pointer)) return;
  if (real_free == nullptr) resolve();
  noted(
      CALL(free_),
      [=] {
        real_free(pointer);
        return 0;
      },
      pointer);
}

KVSPEC_EXPORT void* mmap(void* at, std::size_t length, int prot, int flags, int file,
                         off_t offset) noexcept {
  static decltype(&mmap) found = nullptr;
  real(found, "mmap");
  return noted(CALL(mmap_), [=] { return found(at, length, prot, flags, file, offset); }, at,
               length, prot, flags, file, offset);
}

KVSPEC_EXPORT void* mmap64(void* at, std::size_t length, int prot, int flags, int file,
                           off64_t offset) noexcept {
  static decltype(&mmap64) found = nullptr;
  real(found, "mmap64");
  return noted(CALL(mmap64_), [=] { return found(at, length, prot, flags, file, offset); }, at,
               length, prot, flags, file, offset);
}

KVSPEC_EXPORT int munmap(void* at, std::size_t length) noexcept {
  static decltype(&munmap) found = nullptr;
  real(found, "munmap");
  return noted(CALL(munmap_), [=] { return found(at, length); }, at, length);
}

KVSPEC_EXPORT void* mremap(void* at, std::size_t old, std::size_t size, int flags, ...) noexcept {
  static decltype(&mremap) found = nullptr;
  real(found, "mremap");
  va_list more;
  va_start(more, flags);
  void* to = (flags & MREMAP_FIXED) != 0 ? va_arg(more, void*) : nullptr;
  va_end(more);
  return noted(CALL(mremap_), [=] { return found(at, old, size, flags, to); }, at, old, size,
               flags);
}

KVSPEC_EXPORT int brk(void* to) noexcept {
  static decltype(&brk) found = nullptr;
  real(found, "brk");
  return noted(CALL(brk_), [=] { return found(to); }, to);
}

KVSPEC_EXPORT void* sbrk(std::intptr_t by) noexcept {
  static decltype(&sbrk) found = nullptr;
  real(found, "sbrk");
  return noted(CALL(sbrk_), [=] { return found(by); }, by);
}

KVSPEC_EXPORT int madvise(void* at, std::size_t length, int advice) noexcept {
  static decltype(&madvise) found = nullptr;
  real(found, "madvise");
  return noted(CALL(madvise_), [=] { return found(at, length, advice); }, at, length, advice);
}

KVSPEC_EXPORT int mlock(const void* at, std::size_t length) noexcept {
  static decltype(&mlock) found = nullptr;
  real(found, "mlock");
  return noted(CALL(mlock_), [=] { return found(at, length); }, at, length);
}

KVSPEC_EXPORT int munlock(const void* at, std::size_t length) noexcept {
  static decltype(&munlock) found = nullptr;
  real(found, "munlock");
  return noted(CALL(munlock_), [=] { return found(at, length); }, at, length);
}

KVSPEC_EXPORT int shm_open(const char* name, int flags, mode_t mode) {
  static decltype(&shm_open) found = nullptr;
  real(found, "shm_open");
  return noted(CALL_NAMING(shm_open_, name), [=] { return found(name, flags, mode); }, name, flags,
               mode);
}

KVSPEC_EXPORT int shm_unlink(const char* name) {
  static decltype(&shm_unlink) found = nullptr;
  real(found, "shm_unlink");
  return noted(CALL_NAMING(shm_unlink_, name), [=] { return found(name); }, name);
}

KVSPEC_EXPORT int ftruncate(int file, off_t length) noexcept {
  static decltype(&ftruncate) found = nullptr;
  real(found, "ftruncate");
  return noted(CALL(ftruncate_), [=] { return found(file, length); }, file, length);
}

KVSPEC_EXPORT int ftruncate64(int file, off64_t length) noexcept {
  static decltype(&ftruncate64) found = nullptr;
  real(found, "ftruncate64");
  return noted(CALL(ftruncate64_), [=] { return found(file, length); }, file, length);
}

KVSPEC_EXPORT int posix_fallocate(int file, off_t offset, off_t length) {
  static decltype(&posix_fallocate) found = nullptr;
  real(found, "posix_fallocate");
  return noted(CALL(posix_fallocate_), [=] { return found(file, offset, length); }, file, offset,
               length);
}

// ---- the CUDA runtime, where the process has it ----

namespace {
constexpr int no_driver = 35;  // cudaErrorInsufficientDriver: nobody can call it who has no cudart
}

KVSPEC_EXPORT int cudaHostAlloc(void** where, std::size_t size, unsigned flags) {
  static int (*found)(void**, std::size_t, unsigned) = nullptr;
  if (of_cuda(found, "cudaHostAlloc") == nullptr) return no_driver;
  return noted(CALL(cuda_host_alloc), [=] { return found(where, size, flags); }, where, size,
               flags);
}

KVSPEC_EXPORT int cudaMallocHost(void** where, std::size_t size) {
  static int (*found)(void**, std::size_t) = nullptr;
  if (of_cuda(found, "cudaMallocHost") == nullptr) return no_driver;
  return noted(CALL(cuda_malloc_host), [=] { return found(where, size); }, where, size);
}

KVSPEC_EXPORT int cudaHostRegister(void* at, std::size_t size, unsigned flags) {
  static int (*found)(void*, std::size_t, unsigned) = nullptr;
  if (of_cuda(found, "cudaHostRegister") == nullptr) return no_driver;
  return noted(CALL(cuda_host_register), [=] { return found(at, size, flags); }, at, size, flags);
}

KVSPEC_EXPORT int cudaHostUnregister(void* at) {
  static int (*found)(void*) = nullptr;
  if (of_cuda(found, "cudaHostUnregister") == nullptr) return no_driver;
  return noted(CALL(cuda_host_unregister), [=] { return found(at); }, at);
}

KVSPEC_EXPORT int cudaFreeHost(void* at) {
  static int (*found)(void*) = nullptr;
  if (of_cuda(found, "cudaFreeHost") == nullptr) return no_driver;
  return noted(CALL(cuda_free_host), [=] { return found(at); }, at);
}
