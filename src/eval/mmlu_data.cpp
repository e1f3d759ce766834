#include "eval/mmlu_data.h"

#include <algorithm>
#include <cstddef>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/json_bytes.h"
#include "base/mmap.h"
#include "eval/csv.h"
#include "eval/dataset.h"
#include "eval/sha256.h"
#include "text/utf8.h"

namespace sagelm {
namespace {

namespace fs = std::filesystem;

constexpr size_t kColumns = 2 + kMmluChoices;  // question, choices, answer
constexpr std::array<std::string_view, kColumns> kHeader = {"question", "choice0", "choice1",
                                                            "choice2",  "choice3", "answer"};
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

// A letter or a digit; -1 for anything else.
int parse_answer(std::string_view text) {
  if (text.size() != 1) return -1;
  for (int i = 0; i < kMmluChoices; ++i) {
    if (text[0] == kMmluLetters[static_cast<size_t>(i)] || text[0] == '0' + i) return i;
  }
  return -1;
}

void check_question(const std::string& where, const MmluQuestion& question) {
  if (strip(question.question).empty()) fail("{}: the question is empty", where);
  for (size_t i = 0; i < question.choices.size(); ++i) {
    if (strip(question.choices[i]).empty()) {
      fail("{}: choice {} is empty", where, kMmluLetters[i]);
    }
  }
}

MmluQuestion parse_json_question(const std::string& where, int64_t line, std::string_view row) {
  const nlohmann::json value = parse_json_object(row, where);
  const auto field = [&](const char* name) -> const nlohmann::json& {
    const auto found = value.find(name);
    if (found == value.end()) fail("{}: there is no field \"{}\"", where, name);
    return *found;
  };
  const auto text = [&](const nlohmann::json& item, std::string_view name) {
    if (!item.is_string()) fail("{}: {} is not a string", where, name);
    return item.get<std::string>();
  };
  MmluQuestion question{.line = line, .question = text(field("question"), "\"question\"")};
  const nlohmann::json& choices = field("choices");
  if (!choices.is_array() || choices.size() != kMmluChoices) {
    fail("{}: \"choices\" is not a list of {}", where, kMmluChoices);
  }
  for (size_t i = 0; i < kMmluChoices; ++i) {
    question.choices[i] = text(choices[i], "one of \"choices\"");
  }
  const nlohmann::json& answer = field("answer");
  question.answer = parse_answer(answer.is_number_integer() ? answer.dump()
                                 : answer.is_string()       ? answer.get_ref<const std::string&>()
                                                            : std::string());
  if (question.answer < 0) fail("{}: the answer is not one of A to D or 0 to 3", where);
  const std::string subject = text(field("subject"), "\"subject\"");
  question.subject = find_mmlu_subject(subject);
  if (question.subject == nullptr) {
    fail("{}: '{}' is none of MMLU's subjects", where, excerpt(subject, 40));
  }
  check_question(where, question);
  return question;
}

using BySubject = std::map<const MmluSubjectInfo*, std::vector<MmluQuestion>>;

// Reads the directory's files and keeps account of what was read.
class MmluReader {
 public:
  MmluReader(fs::path directory, const MmluSelection& selection)
      : directory_(std::move(directory)), selection_(selection) {
    for (const std::string& name : selection.subjects) {
      const MmluSubjectInfo* subject = find_mmlu_subject(name);
      if (subject == nullptr) {
        fail_usage("'{}' is none of MMLU's 57 subjects: they are spelled like 'abstract_algebra'",
                   name);
      }
      wanted_.insert(subject);
    }
  }

  MmluData read() {
    std::error_code error;
    if (!fs::is_directory(directory_, error)) {
      fail("{} is not a directory with MMLU's questions", directory_.string());
    }
    const bool csv = fs::is_directory(directory_ / "test", error);
    const bool jsonl = fs::exists(directory_ / "test.jsonl", error);
    if (csv == jsonl) {
      fail("{} holds {} test/*_test.csv {} test.jsonl", directory_.string(),
           csv ? "both" : "neither", csv ? "and" : "nor");
    }
    if (csv) {
      read_csv();
    } else {
      read_jsonl();
    }
    data_.sha256 = sha256_hex(listing_);
    return std::move(data_);
  }

 private:
  template <typename Parse>
  std::vector<MmluQuestion> parse(const std::string& name, const Parse& parser) {
    const fs::path path = directory_ / name;
    const MappedFile file = MappedFile::open(path);
    const std::string_view bytes(reinterpret_cast<const char*>(file.bytes().data()),
                                 file.bytes().size());
    listing_ += sha256_hex(bytes) + "  " + name + "\n";
    data_.bytes += static_cast<int64_t>(bytes.size());
    return parser(path.string(), bytes);
  }

  void read_csv() {
    constexpr std::string_view kSuffix = "_test.csv";
    std::set<const MmluSubjectInfo*> found;
    for (const fs::directory_entry& entry : fs::directory_iterator(directory_ / "test")) {
      const std::string name = entry.path().filename().string();
      if (!name.ends_with(kSuffix)) continue;
      const MmluSubjectInfo* subject =
          find_mmlu_subject(std::string_view(name).substr(0, name.size() - kSuffix.size()));
      if (subject == nullptr) {
        fail("{}: the file's name has none of MMLU's subjects", entry.path().string());
      }
      found.insert(subject);
    }
    if (found.empty()) fail("{} holds no *_test.csv", (directory_ / "test").string());
    // The table is in alphabetical order, and so are pointers into it.
    for (const MmluSubjectInfo* subject : wanted_.empty() ? found : wanted_) {
      const std::string name(subject->name);
      std::vector<MmluQuestion> shots;
      const std::string dev = "dev/" + name + "_dev.csv";
      if (selection_.shots > 0) shots = parse(dev, parse_mmlu_csv);
      const std::string test = "test/" + name + std::string(kSuffix);
      add(*subject, dev, std::move(shots), test, parse(test, parse_mmlu_csv));
    }
  }

  void read_jsonl() {
    BySubject shots;
    if (selection_.shots > 0) shots = by_subject(parse("dev.jsonl", parse_mmlu_jsonl));
    BySubject questions = by_subject(parse("test.jsonl", parse_mmlu_jsonl));
    for (const MmluSubjectInfo* subject : wanted_) {
      if (!questions.contains(subject)) {
        fail("{}: there is no question on {}", (directory_ / "test.jsonl").string(), subject->name);
      }
    }
    for (auto& [subject, list] : questions) {
      if (!wanted_.empty() && !wanted_.contains(subject)) continue;
      add(*subject, "dev.jsonl", std::move(shots[subject]), "test.jsonl", std::move(list));
    }
  }

  static BySubject by_subject(std::vector<MmluQuestion> questions) {
    BySubject result;
    for (MmluQuestion& question : questions) {
      result[question.subject].push_back(std::move(question));
    }
    return result;
  }

  void add(const MmluSubjectInfo& info, const std::string& dev, std::vector<MmluQuestion> shots,
           const std::string& test, std::vector<MmluQuestion> questions) {
    const auto wanted = static_cast<size_t>(selection_.shots);
    if (shots.size() < wanted) {
      fail("{}: {} example{} of {}, fewer than the {} asked for", (directory_ / dev).string(),
           shots.size(), shots.size() == 1 ? "" : "s", info.name, wanted);
    }
    shots.resize(wanted);
    if (selection_.limit && static_cast<uint64_t>(*selection_.limit) < questions.size()) {
      questions.resize(static_cast<size_t>(*selection_.limit));
    }
    data_.subjects.push_back({.info = &info,
                              .file = (directory_ / test).string(),
                              .shots = std::move(shots),
                              .questions = std::move(questions)});
  }

  fs::path directory_;
  const MmluSelection& selection_;
  std::set<const MmluSubjectInfo*> wanted_;
  std::string listing_;
  MmluData data_;
};

}  // namespace

std::vector<MmluQuestion> parse_mmlu_csv(std::string_view name, std::string_view bytes) {
  check_text(name, bytes);
  if (bytes.starts_with(kByteOrderMark)) bytes.remove_prefix(kByteOrderMark.size());
  std::vector<MmluQuestion> questions;
  for (CsvRow& row : parse_csv(name, bytes)) {
    const std::string where = fmt::format("{}:{}", name, row.line);
    if (row.fields.size() != kColumns) {
      fail("{}: {} columns, not the {} of question, A, B, C, D, answer", where, row.fields.size(),
           kColumns);
    }
    if (questions.empty() && row.line == 1 && std::ranges::equal(row.fields, kHeader)) continue;
    MmluQuestion question{.line = row.line,
                          .question = std::move(row.fields.front()),
                          .answer = parse_answer(row.fields.back())};
    if (question.answer < 0) {
      fail("{}: the answer is '{}', none of A to D or 0 to 3", where,
           excerpt(row.fields.back(), 40));
    }
    std::move(row.fields.begin() + 1, row.fields.end() - 1, question.choices.begin());
    check_question(where, question);
    questions.push_back(std::move(question));
  }
  if (questions.empty()) fail("{}: there is no question in the file", name);
  return questions;
}

std::vector<MmluQuestion> parse_mmlu_jsonl(std::string_view name, std::string_view bytes) {
  check_text(name, bytes);
  std::vector<MmluQuestion> questions;
  for (const auto& [line, row] : filled_lines(bytes)) {
    questions.push_back(parse_json_question(fmt::format("{}:{}", name, line), line, row));
  }
  if (questions.empty()) fail("{}: there is no question in the file", name);
  return questions;
}

MmluData load_mmlu(const std::filesystem::path& directory, const MmluSelection& selection) {
  return MmluReader(directory, selection).read();
}

}  // namespace sagelm
