// What the evaluating commands share: flags, the tokenizer without its model, running with a
// progress bar and Ctrl-C, and the fields that every result has.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "eval/dataset.h"
#include "eval/journal.h"
#include "eval/lambada.h"
#include "eval/perplexity.h"
#include "eval/scorer.h"
#include "json_output.h"
#include "options.h"
#include "text/tokenizer.h"

namespace sagelm::cli {

struct EvalFlags {
  CommonOptions common;
  std::string file;
  std::optional<int64_t> limit;
  int64_t batch_tokens = 2048;
  std::optional<std::string> resume;  // the journal's file
};

// Adds the common flags of an evaluation, --file (file_help says what it holds), --limit (of
// `units`) and --batch-tokens. flags must live as long as the command.
void add_eval_options(CLI::App& command, EvalFlags& flags, const std::string& file_help,
                      const std::string& units);

// Adds --limit (of `units`) and --batch-tokens alone.
void add_amount_options(CLI::App& command, EvalFlags& flags, const std::string& units);

// Adds --resume, for commands that keep a journal.
void add_resume_option(CLI::App& command, EvalFlags& flags);

bool adds_bos(const Tokenizer& tokenizer);  // as its configuration says
// With BOS in front if adds_bos.
std::vector<int32_t> encode_for_eval(const Tokenizer& tokenizer, std::string_view text);
// tokenizer must outlive it.
TextEncoder text_encoder(const Tokenizer& tokenizer);

// The model for inputs of at most `longest` tokens, with steps that hold any of them: quantizing
// kernels give other results for an input that is cut into steps, and --batch-tokens is to change
// none.
Model load_for_eval(const CommonOptions& common, const EvalFlags& flags, int64_t longest);
// Tokens of the longest one.
int64_t longest_input(std::span<const Model::ScoreInput> inputs);

// The passages of --file (LAMBADA), checked for that variant.
struct PassageFile {
  std::string bytes;
  std::vector<Passage> passages;  // the first --limit ones
  size_t file_passages = 0;       // that the file holds
};
PassageFile read_passages(const EvalFlags& flags, LambadaVariant variant);

// The journal of --resume, or none. What every run depends on is in its header: the version, the
// command, the model's contents, device and attention, the data, --limit and --batch-tokens; own
// are the command's own fields. Throws Error if the file is of another run.
std::optional<Journal> open_journal(const EvalFlags& flags, std::string_view command,
                                    const ModelInfo& info, std::string_view data,
                                    const JournalHeader& own);

// Calls run with the model's scorer and a callback that draws the progress bar (with the running
// perplexity) and ends the run when Ctrl-C was pressed.
void run_with_progress(Model& model, const std::string& units, int64_t total,
                       const std::function<void(const Scorer&, const EvalCallback&)>& run);

// "model", "attention", "device", "bos", and of the data "file", "file_bytes", "file_sha256".
Json eval_json(const ModelInfo& info, bool bos, const std::string& file, std::string_view bytes);

// " (--limit N)", or nothing without that flag.
std::string limit_note(const EvalFlags& flags);

// With `digits` after the point, or "undefined" where it is infinite or not a number.
std::string format_figure(double value, int digits);

// To be called when the results are out: throws Error (exit status 1) if the run was interrupted,
// saying how to go on if there is a journal.
void report_interrupt(int64_t done, int64_t planned, std::string_view units,
                      const std::optional<std::string>& journal = {});

}  // namespace sagelm::cli
