// Digest: 64 bits that stand for a view, equal in every process.  Not for use against an adversary.
#pragma once

#include <cstdint>
#include <span>

namespace kvspec {

inline constexpr std::uint64_t kDigestStart = 0xcbf29ce484222325U;

constexpr std::uint64_t mix(std::uint64_t digest, std::uint64_t word) noexcept {
  return (digest ^ word) * 0x100000001b3U + 0x9e3779b97f4a7c15U;
}

template <class Integer>
constexpr std::uint64_t mix_all(std::uint64_t digest, std::span<const Integer> words) noexcept {
  for (const Integer word : words) {
    digest = mix(digest, static_cast<std::uint64_t>(static_cast<std::int64_t>(word)));
  }
  return digest;
}

}  // namespace kvspec
