// Page bookkeeping of the KV cache: which pages hold which sequence. Ids and lengths only; the
// bytes are the backend's. docs/kv-cache.md explains the two kinds of cache.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"

namespace sagelm {

class KvCache;

// What a cache has room for, or what sequences need of it.
struct KvRoom {
  int64_t pages = 0;
  int64_t tails = 0;  // a quantized cache's: one per sequence

  KvRoom& operator+=(const KvRoom& other) {
    pages += other.pages;
    tails += other.tails;
    return *this;
  }
};

// For one sequence of so many tokens.
KvRoom kv_room(KvType type, int64_t tokens);

// One sequence's place in a cache. Gives its pages back when destroyed; must not outlive the cache.
// Forks share pages; a sequence that appends to an FP16 page or tail that another one holds gets
// its own copy first.
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
  std::span<const int32_t> pages() const { return pages_; }  // as SequenceChunk has them
  int32_t tail() const { return tail_; }                     // -1 if there is none
  // Takes the pages that count more tokens need and counts them as present. Throws Error with the
  // counts when the cache is full; the sequence is then unchanged.
  void extend(int64_t count);
  // The same for distinct sequences of one cache: all of them, or none if it throws.
  static void extend_all(std::span<Sequence* const> sequences, std::span<const int64_t> counts);
  // Whether extend_all would not throw.
  static bool fit(std::span<Sequence* const> sequences, std::span<const int64_t> counts);
  // Whether truncate undoes extend(count) to the bit: no page of a quantized cache is filled.
  bool can_take_back(int64_t count) const;
  // A sequence of the first `length` tokens of this one, cut as truncate would cut it.
  Sequence fork(int64_t length) const;
  // Forgets the tokens from position length on. A page that is quantized stays whole or goes: if
  // length lies inside one, that page is forgotten too, and length() says what is left, at most
  // kPageTokens - 1 tokens less. Those must run again.
  void truncate(int64_t length);

 private:
  // What extend_all takes out of the cache.
  static KvRoom room_to_extend(std::span<Sequence* const> sequences,
                               std::span<const int64_t> counts);
  // The FP16 page or tail that it appends to first; null if it must take one.
  int32_t* open_page();

  KvCache* cache_;
  int64_t length_ = 0;
  std::vector<int32_t> pages_;
  int32_t tail_ = -1;
};

class KvCache {
 public:
  // Room for sequences that fill their pages; every sequence may leave part of its last one unused.
  KvCache(Backend& backend, KvType type, int64_t num_layers, int64_t num_kv_heads, int64_t head_dim,
          const KvRoom& room);

  KvType type() const { return layout_.type; }
  KvRoom room() const { return {.pages = layout_.num_pages, .tails = layout_.num_tails}; }
  KvRoom free_room() const { return {.pages = pages_.num_free(), .tails = tails_.num_free()}; }
  KvStorage& storage() { return *storage_; }

  // Pages that so many tokens touch.
  static int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

 private:
  friend class Sequence;

  // Ids 0 .. count - 1, each with the number of its owners.
  class Pool {
   public:
    explicit Pool(int64_t count);
    int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
    int32_t owners(int32_t id) const { return owners_[static_cast<size_t>(id)]; }
    int32_t take();  // one must be free
    void add_owner(int32_t id) { ++owners_[static_cast<size_t>(id)]; }
    void release(int32_t id);

   private:
    std::vector<int32_t> free_;
    std::vector<int32_t> owners_;
  };

  bool quantized() const { return is_quantized(layout_.type); }
  Pool& open_pages() { return quantized() ? tails_ : pages_; }
  // Replaces id, which has several owners, by a copy of it.
  void unshare(Pool& pool, int32_t& id);

  KvLayout layout_;
  std::unique_ptr<KvStorage> storage_;
  Pool pages_;
  Pool tails_;
};

}  // namespace sagelm
