#include "eval/mmlu_prompt.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "text/utf8.h"

namespace sagelm {
namespace {

struct PromptEntry {
  MmluPrompt prompt;
  std::string_view name;
  std::string_view description;
};

constexpr std::array kPrompts = {
    PromptEntry{MmluPrompt::kLmEval, "lm-eval",
                "as in lm-evaluation-harness; a prompt that is too long loses its beginning"},
    PromptEntry{MmluPrompt::kOriginal, "original",
                "as in the paper's evaluate.py; a prompt that is too long loses its last examples"},
};

const PromptEntry& entry_of(MmluPrompt prompt) {
  return *std::ranges::find(kPrompts, prompt, &PromptEntry::prompt);
}

}  // namespace

MmluPrompt parse_mmlu_prompt(std::string_view name) {
  const auto found = std::ranges::find(kPrompts, name, &PromptEntry::name);
  if (found != kPrompts.end()) return found->prompt;
  fail_usage("unknown prompt '{}': use one of {}, {}", name, kPrompts[0].name, kPrompts[1].name);
}

std::string_view mmlu_prompt_name(MmluPrompt prompt) { return entry_of(prompt).name; }

std::string_view describe_mmlu_prompt(MmluPrompt prompt) { return entry_of(prompt).description; }

std::string mmlu_item(MmluPrompt prompt, const MmluQuestion& question) {
  std::string text(prompt == MmluPrompt::kLmEval ? strip(question.question)
                                                 : std::string_view(question.question));
  for (size_t i = 0; i < question.choices.size(); ++i) {
    text += fmt::format("\n{}. {}", kMmluLetters[i], question.choices[i]);
  }
  return text + "\nAnswer:";
}

std::string mmlu_beginning(MmluPrompt prompt, std::string_view subject,
                           std::span<const MmluQuestion> shots) {
  std::string words(subject);
  std::ranges::replace(words, '_', ' ');
  if (prompt == MmluPrompt::kOriginal) words.insert(0, 1, ' ');
  std::string text = fmt::format(
      "The following are multiple choice questions (with answers) about {}.\n\n", words);
  for (const MmluQuestion& shot : shots) {
    text += fmt::format("{} {}\n\n", mmlu_item(prompt, shot),
                        kMmluLetters[static_cast<size_t>(shot.answer)]);
  }
  return text;
}

}  // namespace sagelm
