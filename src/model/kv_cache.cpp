#include "model/kv_cache.h"

#include <utility>

#include "base/error.h"

namespace sagelm {

KvCache::KvCache(Backend& backend, int64_t num_layers, int64_t num_kv_heads, int64_t head_dim,
                 int64_t num_pages)
    : layout_{num_layers, num_kv_heads, head_dim, num_pages},
      storage_(backend.make_kv(layout_)),
      owners_(static_cast<size_t>(num_pages)) {
  free_.reserve(static_cast<size_t>(num_pages));
  for (int64_t page = num_pages - 1; page >= 0; --page) {
    free_.push_back(static_cast<int32_t>(page));
  }
}

Sequence::~Sequence() { truncate(0); }

Sequence::Sequence(Sequence&& other) noexcept
    : cache_(other.cache_),
      length_(std::exchange(other.length_, 0)),
      pages_(std::exchange(other.pages_, {})) {}

Sequence& Sequence::operator=(Sequence&& other) noexcept {
  if (this != &other) {
    truncate(0);
    cache_ = other.cache_;
    length_ = std::exchange(other.length_, 0);
    pages_ = std::exchange(other.pages_, {});
  }
  return *this;
}

void Sequence::extend(int64_t count) {
  const int64_t needed = KvCache::pages_for(length_ + count) - static_cast<int64_t>(pages_.size());
  if (needed > cache_->free_pages()) {
    fail("the KV cache is full: {} more tokens need {} pages of {} tokens, and {} of {} are free",
         count, needed, kPageTokens, cache_->free_pages(), cache_->num_pages());
  }
  if (count > 0 && length_ % kPageTokens != 0 &&
      cache_->owners_[static_cast<size_t>(pages_.back())] > 1) {
    fail("position {} of a sequence is on a page of the KV cache that another one shares", length_);
  }
  for (int64_t i = 0; i < needed; ++i) {
    pages_.push_back(cache_->free_.back());
    cache_->free_.pop_back();
    cache_->owners_[static_cast<size_t>(pages_.back())] = 1;
  }
  length_ += count;
}

Sequence Sequence::share(int64_t length) const {
  if (length < 0 || length > length_ || length % kPageTokens != 0) {
    fail("{} tokens of a sequence of {} cannot be shared: whole pages of {} can", length, length_,
         kPageTokens);
  }
  Sequence other(*cache_);
  other.length_ = length;
  other.pages_.assign(pages_.begin(), pages_.begin() + KvCache::pages_for(length));
  for (const int32_t page : other.pages_) ++cache_->owners_[static_cast<size_t>(page)];
  return other;
}

void Sequence::truncate(int64_t length) {
  if (length >= length_) return;
  length_ = length;
  const auto kept = static_cast<size_t>(KvCache::pages_for(length));
  while (pages_.size() > kept) {
    if (--cache_->owners_[static_cast<size_t>(pages_.back())] == 0) {
      cache_->free_.push_back(pages_.back());
    }
    pages_.pop_back();
  }
}

}  // namespace sagelm
