// Observer: the sink that rooms report operations to, attached from above.  Spec: OBS.
//
// A room holds a Reporter.  Before it changes anything it calls guard(), after the change report(),
// which never throws: what a report needs is allocated before.  With nothing attached both are one
// branch that is not taken, and nothing is allocated (OBS-4).
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "kvspec/contract.hpp"

namespace kvspec {

// One operation that took effect.
struct Operation {
  const char* room;
  const char* name;
  std::span<const std::int64_t> slots;  // what it moved: slots, or rows; valid during the report
  std::int64_t number;                  // operations reported before it since attach
};

// A function and what it is called with.  It must not throw (OBS-2).
struct Observer {
  void (*see)(void* context, const Operation& operation) noexcept = nullptr;
  void* context = nullptr;
};

class Reporter {
 public:
  explicit Reporter(const char* room) noexcept : room_(room) {}

  // Reports every operation from now on, counted from 0; Observer{} detaches (OBS-1).
  void attach(Observer observer) {
    guard("attach");
    observer_ = observer;
    reported_count_ = 0;
  }

  bool attached() const noexcept { return observer_.see != nullptr; }

  // REQUIRES: not called from inside the observer (OBS-3).
  void guard(const char* name) const {
    if (reporting_) [[unlikely]] {
      refuse("OBS-3", std::string(name) + " was called from inside an observer");
    }
  }

  // Tells the observer, if there is one, of an operation that took effect (OBS-1).
  void report(const char* name, std::span<const std::int64_t> slots = {}) noexcept {
    if (attached()) [[unlikely]] {
      reporting_ = true;
      observer_.see(observer_.context, {room_, name, slots, reported_count_});
      reporting_ = false;
      ++reported_count_;
    }
  }

 private:
  const char* room_;
  Observer observer_;
  std::int64_t reported_count_ = 0;  // since attach
  bool reporting_ = false;           // the observer is being called
};

}  // namespace kvspec
