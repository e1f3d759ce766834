#include "model/kv_cache.h"

#include <map>
#include <numeric>
#include <utility>

#include "base/error.h"

namespace sagelm {

KvRoom kv_room(KvType type, int64_t tokens) {
  if (type == KvType::kFp16) return {.pages = KvCache::pages_for(tokens)};
  return {.pages = tokens / kPageTokens, .tails = tokens > 0 ? 1 : 0};
}

KvCache::Pool::Pool(int64_t count) : owners_(static_cast<size_t>(count)) {
  free_.reserve(owners_.size());
  for (int64_t id = count - 1; id >= 0; --id) free_.push_back(static_cast<int32_t>(id));
}

int32_t KvCache::Pool::take() {
  const int32_t id = free_.back();
  free_.pop_back();
  owners_[static_cast<size_t>(id)] = 1;
  return id;
}

void KvCache::Pool::release(int32_t id) {
  if (--owners_[static_cast<size_t>(id)] == 0) free_.push_back(id);
}

KvCache::KvCache(Backend& backend, KvType type, int64_t num_layers, int64_t num_kv_heads,
                 int64_t head_dim, const KvRoom& room)
    : layout_{type, num_layers, num_kv_heads, head_dim, room.pages, room.tails},
      storage_(backend.make_kv(layout_)),
      pages_(room.pages),
      tails_(room.tails) {}

void KvCache::unshare(Pool& pool, int32_t& id) {
  const int32_t copy = pool.take();
  storage_->copy_open_page(id, copy);
  pool.release(id);
  id = copy;
}

Sequence::~Sequence() { truncate(0); }

Sequence::Sequence(Sequence&& other) noexcept
    : cache_(other.cache_),
      length_(std::exchange(other.length_, 0)),
      pages_(std::exchange(other.pages_, {})),
      tail_(std::exchange(other.tail_, -1)) {}

Sequence& Sequence::operator=(Sequence&& other) noexcept {
  if (this != &other) {
    truncate(0);
    cache_ = other.cache_;
    length_ = std::exchange(other.length_, 0);
    pages_ = std::exchange(other.pages_, {});
    tail_ = std::exchange(other.tail_, -1);
  }
  return *this;
}

void Sequence::extend(int64_t count) {
  Sequence* const self = this;
  extend_all({&self, 1}, {&count, 1});
}

int32_t* Sequence::open_page() {
  if (cache_->quantized()) return tail_ < 0 ? nullptr : &tail_;
  return length_ % kPageTokens == 0 ? nullptr : &pages_.back();
}

KvRoom Sequence::room_to_extend(std::span<Sequence* const> sequences,
                                std::span<const int64_t> counts) {
  KvRoom needed;
  std::map<int32_t, int32_t> appended_by;  // how many of the sequences append to an open page
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& sequence = *sequences[i];
    if (counts[i] == 0) continue;
    KvCache& cache = *sequence.cache_;
    const KvRoom room = kv_room(cache.type(), sequence.length_ + counts[i]);
    needed.pages += room.pages - static_cast<int64_t>(sequence.pages_.size());
    const int32_t* open = sequence.open_page();
    if (open == nullptr) {
      needed.tails += room.tails;
    } else if (++appended_by[*open] < cache.open_pages().owners(*open)) {
      // A copy; the last owner keeps the original.
      ++(cache.quantized() ? needed.tails : needed.pages);
    }
  }
  return needed;
}

bool Sequence::fit(std::span<Sequence* const> sequences, std::span<const int64_t> counts) {
  if (sequences.empty()) return true;
  const KvRoom needed = room_to_extend(sequences, counts);
  const KvRoom free = sequences.front()->cache_->free_room();
  return needed.pages <= free.pages && needed.tails <= free.tails;
}

bool Sequence::can_take_back(int64_t count) const {
  return !cache_->quantized() || length_ / kPageTokens == (length_ + count) / kPageTokens;
}

void Sequence::extend_all(std::span<Sequence* const> sequences, std::span<const int64_t> counts) {
  if (sequences.empty()) return;
  KvCache& cache = *sequences.front()->cache_;
  const KvRoom needed = room_to_extend(sequences, counts);
  const KvRoom free = cache.free_room();
  if (needed.pages > free.pages) {
    const int64_t tokens = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    fail("the KV cache is full: {} more tokens need {} pages of {} tokens, and {} of {} are free",
         tokens, needed.pages, kPageTokens, free.pages, cache.room().pages);
  }
  if (needed.tails > free.tails) {
    fail("the KV cache is full: {} more sequences begin in it, and it has room for {} of {}",
         needed.tails, free.tails, cache.room().tails);
  }

  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& sequence = *sequences[i];
    if (counts[i] == 0) continue;
    int32_t* open = sequence.open_page();
    if (open == nullptr) {
      if (cache.quantized()) sequence.tail_ = cache.tails_.take();
    } else if (cache.open_pages().owners(*open) > 1) {
      cache.unshare(cache.open_pages(), *open);
    }
    sequence.length_ += counts[i];
    const auto pages = static_cast<size_t>(kv_room(cache.type(), sequence.length_).pages);
    while (sequence.pages_.size() < pages) sequence.pages_.push_back(cache.pages_.take());
  }
}

Sequence Sequence::fork(int64_t length) const {
  if (length < 0 || length > length_) {
    fail("a sequence of {} tokens cannot be forked at {}", length_, length);
  }
  Sequence other(*cache_);
  other.length_ = length_;
  other.pages_ = pages_;
  other.tail_ = tail_;
  for (const int32_t page : pages_) cache_->pages_.add_owner(page);
  if (tail_ >= 0) cache_->tails_.add_owner(tail_);
  other.truncate(length);
  return other;
}

void Sequence::truncate(int64_t length) {
  if (length >= length_) return;
  const bool in_tail = length >= length_ / kPageTokens * kPageTokens;
  length_ = cache_->quantized() && !in_tail ? length / kPageTokens * kPageTokens : length;
  const auto kept = static_cast<size_t>(kv_room(cache_->type(), length_).pages);
  while (pages_.size() > kept) {
    cache_->pages_.release(pages_.back());
    pages_.pop_back();
  }
  if (length_ == 0 && tail_ >= 0) cache_->tails_.release(std::exchange(tail_, -1));
}

}  // namespace sagelm
