// Page bookkeeping of the KV cache: which pages hold which sequence. Ids and lengths only; the
// bytes are the backend's.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"

namespace sagelm {

class KvCache;

// One sequence's place in a cache. Gives its pages back when destroyed; must not outlive the cache.
// Sequences that begin alike can share whole pages of that beginning (share); nobody writes to a
// page that several own.
class Sequence {
 public:
  explicit Sequence(KvCache& cache) : cache_(&cache) {}
  ~Sequence();
  Sequence(Sequence&& other) noexcept;
  Sequence& operator=(Sequence&& other) noexcept;
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  KvCache& cache() const { return *cache_; }
  int64_t length() const { return length_; }
  std::span<const int32_t> pages() const { return pages_; }
  // Takes the pages that count more tokens need and counts them as present. Throws Error with the
  // counts when the cache is full, or when the first of the tokens belongs on a page that another
  // sequence shares; the sequence is then unchanged.
  void extend(int64_t count);
  // A sequence of the first `length` tokens of this one, on the same pages, which go back when
  // their last owner gives them up. Throws Error unless length is whole pages that are there.
  Sequence share(int64_t length) const;
  // Forgets all tokens from position length on (rollback).
  void truncate(int64_t length);

 private:
  KvCache* cache_;
  int64_t length_ = 0;
  std::vector<int32_t> pages_;
};

class KvCache {
 public:
  // Room for max_tokens tokens in sequences that fill their pages; every sequence may leave part of
  // its last page unused.
  KvCache(Backend& backend, int64_t num_layers, int64_t num_kv_heads, int64_t head_dim,
          int64_t num_pages);

  int64_t num_pages() const { return layout_.num_pages; }
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }
  int64_t bytes() const { return layout_.bytes(); }
  KvStorage& storage() { return *storage_; }

  static int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

 private:
  friend class Sequence;
  KvLayout layout_;
  std::unique_ptr<KvStorage> storage_;
  std::vector<int32_t> free_;
  std::vector<int32_t> owners_;  // of each page: how many sequences hold it
};

}  // namespace sagelm
