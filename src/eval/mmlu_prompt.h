// The text that an MMLU question is asked with.
//
//   lm-eval   tasks "mmlu" of EleutherAI's lm-evaluation-harness (group version 2, task
//   version 1.0;
//             lm_eval/tasks/mmlu/default), one blank after "about", white space around the question
//             removed.
//   original  evaluate.py of the paper's authors (github.com/hendrycks/test), whose format_subject
//             puts a blank before every word, so that two follow "about"; the question as it is.
//
// Both begin with one sentence on the subject, also without examples, give question, four lettered
// choices and "Answer:" a line each, and end each worked example with its letter and an empty line.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "eval/mmlu_data.h"

namespace sagelm {

enum class MmluPrompt : uint8_t { kLmEval, kOriginal };

// Throws UsageError listing the names.
MmluPrompt parse_mmlu_prompt(std::string_view name);
std::string_view mmlu_prompt_name(MmluPrompt prompt);
std::string_view describe_mmlu_prompt(MmluPrompt prompt);  // one sentence, for reports

// What all questions of a subject have in front: the sentence and the examples.
std::string mmlu_beginning(MmluPrompt prompt, std::string_view subject,
                           std::span<const MmluQuestion> shots);
// The question itself, up to "Answer:". An answer is a blank and a letter.
std::string mmlu_item(MmluPrompt prompt, const MmluQuestion& question);

}  // namespace sagelm
