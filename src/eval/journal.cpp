#include "eval/journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "eval/sha256.h"

namespace sagelm {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kDigestDigits = 16;
constexpr size_t kPrefix = kDigestDigits + 1;  // the digest and a blank
constexpr std::string_view kFormatField = "journal";
constexpr std::string_view kFormat = "sagelm 1";
constexpr std::chrono::seconds kSyncEvery{1};

std::string chained_digest(std::string_view previous, std::string_view text) {
  return sha256_hex(std::string(previous) + std::string(text)).substr(0, kDigestDigits);
}

std::string header_text(const JournalHeader& header) {
  Json json;
  json[std::string(kFormatField)] = kFormat;
  for (const auto& [name, value] : header) json[name] = value;
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

struct Line {
  std::string_view digest;
  std::string_view text;
  size_t end;  // in the file, its newline included
};

// The lines of bytes that end with a newline and are long enough for a digest; stops at others.
std::vector<Line> split_lines(std::string_view bytes) {
  std::vector<Line> lines;
  size_t begin = 0;
  for (size_t end = bytes.find('\n'); end != std::string_view::npos;
       end = bytes.find('\n', begin)) {
    const std::string_view line = bytes.substr(begin, end - begin);
    const bool has_digest = line.size() >= kPrefix && line[kDigestDigits] == ' ';
    lines.push_back({.digest = has_digest ? line.substr(0, kDigestDigits) : std::string_view(),
                     .text = has_digest ? line.substr(kPrefix) : std::string_view(),
                     .end = end + 1});
    begin = end + 1;
  }
  return lines;
}

// Throws Error saying in what the journal's header differs from ours.
void check_header(const std::filesystem::path& path, std::string_view text,
                  const JournalHeader& header) {
  const Json theirs = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto value_of = [&theirs](std::string_view name) -> std::optional<std::string> {
    if (!theirs.is_object()) return {};
    const auto field = theirs.find(name);
    if (field == theirs.end() || !field->is_string()) return {};
    return field->get<std::string>();
  };
  if (value_of(kFormatField) != kFormat) {
    fail("the journal {} is not of the format \"{}\"", path.string(), kFormat);
  }
  for (const auto& [name, value] : header) {
    const std::optional<std::string> found = value_of(name);
    if (found != value) {
      fail("the journal {} is another run's: its {} is {}, not \"{}\"", path.string(), name,
           found ? "\"" + *found + "\"" : "missing", value);
    }
  }
  if (text != header_text(header)) {
    fail("the journal {} is another run's: its header has other fields", path.string());
  }
}

std::string read_all(int file, const std::filesystem::path& path) {
  std::string bytes;
  std::array<char, 1 << 16> buffer;
  for (;;) {
    const ssize_t count = ::read(file, buffer.data(), buffer.size());
    if (count == 0) return bytes;
    if (count < 0) {
      if (errno == EINTR) continue;
      fail("cannot read the journal {}: {}", path.string(), std::strerror(errno));
    }
    bytes.append(buffer.data(), static_cast<size_t>(count));
  }
}

}  // namespace

Journal Journal::open(const std::filesystem::path& path, const JournalHeader& header) {
  constexpr mode_t kMode = 0644;
  Journal journal;
  journal.path_ = path;
  journal.file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, kMode);
  if (journal.file_ < 0) {
    fail("cannot open the journal {}: {}", path.string(), std::strerror(errno));
  }
  if (::flock(journal.file_, LOCK_EX | LOCK_NB) != 0) {
    fail("the journal {} is in use by another process", path.string());
  }
  const std::string bytes = read_all(journal.file_, path);
  const std::vector<Line> lines = split_lines(bytes);
  const std::string first_text = header_text(header);
  if (lines.empty()) {
    // Nothing yet, or what a killed run left of the header; but never somebody's other file.
    const std::string first_line = chained_digest({}, first_text) + ' ' + first_text;
    if (!first_line.starts_with(bytes)) fail("{} is not a journal of sagelm", path.string());
  } else if (lines[0].digest != chained_digest({}, lines[0].text)) {
    fail("{} is not a journal of sagelm", path.string());
  } else {
    check_header(path, lines[0].text, header);
  }

  size_t valid_end = 0;
  std::optional<size_t> first_bad;
  for (size_t i = 0; i < lines.size(); ++i) {
    const std::string_view previous = i > 0 ? lines[i - 1].digest : std::string_view();
    const bool valid = lines[i].digest == chained_digest(previous, lines[i].text);
    if (valid && first_bad) {
      fail("{}:{}: the journal is damaged here, before its end", path.string(), *first_bad + 1);
    }
    if (!valid && !first_bad) first_bad = i;
    if (!valid || first_bad) continue;
    if (i > 0) journal.records_.emplace_back(lines[i].text);
    journal.digest_ = lines[i].digest;
    valid_end = lines[i].end;
  }
  if (valid_end < bytes.size() && ::ftruncate(journal.file_, static_cast<off_t>(valid_end)) != 0) {
    fail("cannot cut the journal {}: {}", path.string(), std::strerror(errno));
  }
  if (lines.empty()) journal.write_line(first_text);
  return journal;
}

Journal::Journal(Journal&& other) noexcept { *this = std::move(other); }

Journal& Journal::operator=(Journal&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(file_, other.file_);
  std::swap(digest_, other.digest_);
  std::swap(records_, other.records_);
  std::swap(next_, other.next_);
  std::swap(synced_, other.synced_);
  return *this;
}

Journal::~Journal() {
  if (file_ >= 0) ::close(file_);
}

std::optional<std::string> Journal::next() {
  if (next_ == records_.size()) return {};
  return std::move(records_[next_++]);
}

void Journal::append(std::string_view record) {
  if (next_ < records_.size()) {
    fail("the journal {} has records that do not belong to this run", path_.string());
  }
  if (record.find('\n') != std::string_view::npos) {
    fail("a record of the journal {} is more than one line", path_.string());
  }
  write_line(record);
}

void Journal::write_line(std::string_view text) {
  digest_ = chained_digest(digest_, text);
  const std::string line = digest_ + ' ' + std::string(text) + '\n';
  for (std::string_view rest = line; !rest.empty();) {
    const ssize_t count = ::write(file_, rest.data(), rest.size());
    if (count < 0) {
      if (errno == EINTR) continue;
      fail("cannot write the journal {}: {}", path_.string(), std::strerror(errno));
    }
    rest.remove_prefix(static_cast<size_t>(count));
  }
  const auto now = std::chrono::steady_clock::now();
  if (now - synced_ < kSyncEvery) return;
  ::fdatasync(file_);  // best effort: not all files can
  synced_ = now;
}

}  // namespace sagelm
