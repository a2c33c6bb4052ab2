// Channel in shared memory: the core of an end.  Blocks are Python's: python/kvspec/native.
#include "kvspec/shm_channel.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "kvspec/contract.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using kvspec::Patience;
using kvspec::ShmChannel;
using Timeout = std::optional<double>;

namespace {

// The bytes of a contiguous buffer, or of a contiguous tensor on the CPU, while this lives.
class Buffer {
 public:
  Buffer(nb::handle given, const char* clause) {
    if (PyObject_GetBuffer(given.ptr(), &view_, PyBUF_CONTIG_RO) == 0) {
      held_ = true;
      bytes_ = {static_cast<std::byte*>(view_.buf), static_cast<std::size_t>(view_.len)};
      return;
    }
    PyErr_Clear();
    if (!nb::hasattr(given, "untyped_storage")) {
      const nb::str type(given.type().attr("__name__"));
      kvspec::refuse(clause, std::string(type.c_str()) + " is no contiguous buffer");
    }
    take_tensor(given, clause);
  }
  ~Buffer() {
    if (held_) PyBuffer_Release(&view_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::span<std::byte> bytes() const noexcept { return bytes_; }
  bool is_read_only() const noexcept { return held_ && view_.readonly != 0; }

 private:
  void take_tensor(nb::handle given, const char* clause) {
    const bool on_cpu = given.attr("device").attr("type").equal(nb::str("cpu"));
    if (!on_cpu || !nb::cast<bool>(given.attr("is_contiguous")())) {
      kvspec::refuse(clause, "a tensor was given that is not contiguous on the CPU");
    }
    const auto address = nb::cast<std::uintptr_t>(given.attr("data_ptr")());
    const auto count = nb::cast<std::size_t>(given.attr("numel")());
    bytes_ = {reinterpret_cast<std::byte*>(address),
              count * nb::cast<std::size_t>(given.attr("element_size")())};
  }

  Py_buffer view_{};
  bool held_ = false;
  std::span<std::byte> bytes_;
};

// Ctrl-C, and whatever else Python has for the main thread.
void run_signal_handlers() {
  const nb::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

Patience patience(const Timeout& timeout) { return {timeout, &run_signal_handlers}; }

bool send(ShmChannel& self, nb::handle data, const Timeout& timeout) {
  const ShmChannel::Turn turn(self, "send");
  turn.require_writer(timeout);
  const Buffer buffer(data, "CHAN-8");
  self.require_fits(buffer.bytes().size());
  const nb::gil_scoped_release released;
  if (!self.wait_for_room(patience(timeout))) return false;
  self.put(buffer.bytes());
  return true;
}

bool waited_for_message(ShmChannel& self, const Timeout& timeout) {
  const nb::gil_scoped_release released;
  return self.wait_for_message(patience(timeout));
}

nb::object receive(ShmChannel& self, const Timeout& timeout) {
  const ShmChannel::Turn turn(self, "receive");
  turn.require_reader(timeout);
  if (!waited_for_message(self, timeout)) return nb::none();
  const std::size_t count = self.message().size();
  const nb::object copy =
      nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(count)));
  if (!copy.is_valid()) throw nb::python_error();
  auto* bytes = reinterpret_cast<std::byte*>(PyBytes_AS_STRING(copy.ptr()));
  const nb::gil_scoped_release released;
  self.take({bytes, count});
  return copy;
}

std::optional<std::size_t> receive_into(ShmChannel& self, nb::handle given,
                                        const Timeout& timeout) {
  const ShmChannel::Turn turn(self, "receive_into");
  turn.require_reader(timeout);
  const Buffer buffer(given, "CHAN-12");
  if (buffer.is_read_only()) kvspec::refuse("CHAN-12", "the buffer is read-only");
  const nb::gil_scoped_release released;
  if (!self.wait_for_message(patience(timeout))) return std::nullopt;
  const std::size_t count = self.message().size();
  if (count > buffer.bytes().size()) {
    kvspec::refuse("CHAN-12", "the message has " + std::to_string(count) + " bytes, the buffer " +
                                  std::to_string(buffer.bytes().size()));
  }
  self.take(buffer.bytes().first(count));
  return count;
}

// Address and length of a block that is open from now on.
nb::object held(ShmChannel& self, std::span<const std::byte> block) {
  self.hold_block(true);
  return nb::make_tuple(reinterpret_cast<std::uintptr_t>(block.data()), block.size());
}

nb::object hold_room(ShmChannel& self, const Timeout& timeout) {
  const ShmChannel::Turn turn(self, "write_block");
  turn.require_writer(timeout);
  {
    const nb::gil_scoped_release released;
    if (!self.wait_for_room(patience(timeout))) return nb::none();
  }
  return held(self, self.room());
}

nb::object hold_message(ShmChannel& self, const Timeout& timeout) {
  const ShmChannel::Turn turn(self, "read_block");
  turn.require_reader(timeout);
  if (!waited_for_message(self, timeout)) return nb::none();
  return held(self, self.message());
}

void close(ShmChannel& self) {
  if (self.closed()) return;
  const ShmChannel::Turn turn(self, "close");
  self.close();
}

nb::dict counters(const ShmChannel& self) {
  const kvspec::ShmChannelCounters found = self.counters();
  nb::dict named;
  named["bytes_copied"] = found.bytes_copied;
  named["looks"] = found.looks;
  named["sleeps"] = found.sleeps;
  named["wakes"] = found.wakes;
  return named;
}

template <class Items>
nb::tuple tuple_of(const Items& items) {
  nb::list list;
  for (const auto& item : items) list.append(item);
  return nb::tuple(list);
}

nb::tuple seen(const ShmChannel& self) {
  const kvspec::ShmChannelView view = self.view();
  return nb::make_tuple(view.writer, view.written, tuple_of(view.read), tuple_of(view.readers));
}

// Methods of kvspec.interfaces.shm_channel.ShmChannel.
void def_public(nb::class_<ShmChannel>& end) {
  end.def_prop_ro("name", &ShmChannel::name, "Of the segment: what `attach` is given.")
      .def_prop_ro("block_bytes", [](const ShmChannel& self) { return self.shape().block_bytes; })
      .def_prop_ro("block_count", [](const ShmChannel& self) { return self.shape().block_count; })
      .def_prop_ro("reader_count", [](const ShmChannel& self) { return self.shape().reader_count; })
      .def_prop_ro("reader", &ShmChannel::reader, "Whose end this is; None for the writer's.")
      .def_prop_rw("death_check", &ShmChannel::death_check, &ShmChannel::set_death_check,
                   "Seconds after which a waiting end looks again whether its peers live.")
      .def_prop_ro("ended", &ShmChannel::ended,
                   "Whether the writer has closed and this reader has everything (CHAN-18).")
      .def("send", &send, "data"_a.none(), "timeout"_a = nb::none(),
           nb::sig("def send(self, data: kvspec.interfaces.shm_channel.Bytes, "
                   "timeout: float | None = None) -> bool"),
           "Send a copy of the bytes; False if no room came (CHAN-6, CHAN-7, CHAN-8, CHAN-24).")
      .def("receive", &receive, "timeout"_a = nb::none(),
           nb::sig("def receive(self, timeout: float | None = None) -> bytes | None"),
           "The next message; None if none came, or none will (CHAN-9, CHAN-10, CHAN-18).")
      .def("receive_into", &receive_into, "buffer"_a.none(), "timeout"_a = nb::none(),
           nb::sig("def receive_into(self, buffer: kvspec.interfaces.shm_channel.Bytes, "
                   "timeout: float | None = None) -> int | None"),
           "As `receive`, into a buffer; how many bytes (CHAN-11, CHAN-12).")
      .def(
          "wait_for_readers",
          [](ShmChannel& self, const Timeout& timeout) {
            const ShmChannel::Turn turn(self, "wait_for_readers");
            turn.require_writer(timeout);
            const nb::gil_scoped_release released;
            return self.wait_for_readers(patience(timeout));
          },
          "timeout"_a = nb::none(), "Whether no place is absent any more (CHAN-20, CHAN-25).")
      .def(
          "drop_reader",
          [](ShmChannel& self, std::int64_t reader) {
            const ShmChannel::Turn turn(self, "drop_reader");
            turn.require_writer();
            self.drop_reader(reader);
          },
          "reader"_a, "Go on without a reader that is gone, or never came (CHAN-22, CHAN-23).")
      .def("counters", &counters, nb::sig("def counters(self) -> dict[str, int]"),
           "Exact costs so far (CHAN-30).")
      .def(
          "check",
          [](ShmChannel& self) {
            const ShmChannel::Turn turn(self, "check");
            self.check();
          },
          "Raise ContractError if cursors or description are broken (CHAN-28).");
}

// What python/kvspec/native makes blocks of.
void def_blocks(nb::class_<ShmChannel>& end) {
  end.def("hold_room", &hold_room, "timeout"_a = nb::none(),
          nb::sig("def hold_room(self, timeout: float | None = None) -> tuple[int, int] | None"),
          "Address and length of the next block, open from now on; None if no room came.")
      .def("hold_message", &hold_message, "timeout"_a = nb::none(),
           nb::sig("def hold_message(self, timeout: float | None = None) "
                   "-> tuple[int, int] | None"),
           "Address and length of the next message, its block open from now on; None if none came.")
      .def(
          "let_go", [](ShmChannel& self) { self.hold_block(false); },
          "The block is not open any more.")
      .def("publish", &ShmChannel::publish, "nbytes"_a,
           "The first bytes of the next block are the last message (CHAN-13).")
      .def("advance", &ShmChannel::advance, "The message was received (CHAN-15).")
      .def("close_end", &close, "The channel ends, or the reader leaves (CHAN-18, CHAN-19).")
      .def_prop_ro("closed", &ShmChannel::closed)
      .def("seen", &seen,
           nb::sig("def seen(self) -> tuple[str, int, tuple[int, ...], tuple[str, ...]]"),
           "Of `view()`: writer, written, read, readers. REQUIRES: not closed.");
}

}  // namespace

void bind_shm_channel(nb::module_& m) {
  nb::class_<ShmChannel> end(m, "ShmChannelEnd", "The core of one end of a channel. Spec: CHAN.");
  end.def(
         "__init__",
         [](ShmChannel* self, const std::string& label, std::int64_t block_bytes,
            std::int64_t block_count, std::int64_t reader_count) {
           new (self) ShmChannel(label, {block_bytes, block_count, reader_count});
         },
         "label"_a, "block_bytes"_a, "block_count"_a, "reader_count"_a,
         "The writer's end of a new channel (CHAN-2, CHAN-3).")
      .def(nb::init<const std::string&, std::int64_t>(), "name"_a, "reader"_a,
           "The end of one reader (CHAN-4, CHAN-5).");
  def_public(end);
  def_blocks(end);
}
