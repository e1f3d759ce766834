#include "eval_options.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "eval/model_hash.h"
#include "eval/sha256.h"
#include "interrupt.h"
#include "progress.h"

namespace sagelm::cli {

void add_eval_options(CLI::App& command, EvalFlags& flags, const std::string& file_help,
                      const std::string& units) {
  add_common_options(command, flags.common,
                     kModelGroup | kComputeGroup | kJsonGroup | kVerboseGroup);
  command.add_option("--file", flags.file, file_help)
      ->option_text("FILE")
      ->required()
      ->check(not_empty);
  add_amount_options(command, flags, units);
}

void add_amount_options(CLI::App& command, EvalFlags& flags, const std::string& units) {
  constexpr int64_t kMaxCount = int64_t{1} << 40;
  constexpr int64_t kMaxBatchTokens = int64_t{1} << 24;
  command.add_option("--limit", flags.limit, "only the first N " + units)
      ->option_text("N")
      ->check(CLI::Range(int64_t{1}, kMaxCount));
  command
      .add_option("--batch-tokens", flags.batch_tokens,
                  "tokens computed together at most; changes speed and memory, not the result")
      ->option_text("N (default: 2048)")
      ->check(CLI::Range(int64_t{2}, kMaxBatchTokens));
}

void add_resume_option(CLI::App& command, EvalFlags& flags) {
  command
      .add_option(
          "--resume", flags.resume,
          "journal: written while the run goes on, and if it is there already, gone on from")
      ->option_text("FILE")
      ->check(not_empty);
}

bool adds_bos(const Tokenizer& tokenizer) {
  return tokenizer.add_bos_default() && tokenizer.bos_id() >= 0;
}

std::vector<int32_t> encode_for_eval(const Tokenizer& tokenizer, std::string_view text) {
  return tokenizer.encode(text, adds_bos(tokenizer));
}

TextEncoder text_encoder(const Tokenizer& tokenizer) {
  TextEncoder encoder;
  encoder.encode = [&tokenizer](std::string_view text) { return tokenizer.encode(text, false); };
  if (tokenizer.bos_id() >= 0) encoder.bos_id = tokenizer.bos_id();
  if (tokenizer.eos_id() >= 0) encoder.eos_id = tokenizer.eos_id();
  encoder.adds_bos = adds_bos(tokenizer);
  return encoder;
}

Model load_for_eval(const CommonOptions& common, const EvalFlags& flags, int64_t longest) {
  return load_model(common, std::max(flags.batch_tokens, longest));
}

int64_t longest_input(std::span<const Model::ScoreInput> inputs) {
  size_t longest = 0;
  for (const Model::ScoreInput& input : inputs) longest = std::max(longest, input.ids.size());
  return static_cast<int64_t>(longest);
}

PassageFile read_passages(const EvalFlags& flags, LambadaVariant variant) {
  PassageFile file;
  file.bytes = read_text_file(flags.file);
  file.passages = parse_passages(flags.file, file.bytes);
  if (variant == LambadaVariant::kWord) check_last_words(flags.file, file.passages);
  file.file_passages = file.passages.size();
  if (flags.limit && static_cast<uint64_t>(*flags.limit) < file.passages.size()) {
    file.passages.resize(static_cast<size_t>(*flags.limit));
  }
  return file;
}

std::optional<Journal> open_journal(const EvalFlags& flags, std::string_view command,
                                    const ModelInfo& info, std::string_view data,
                                    const JournalHeader& own) {
  if (!flags.resume) return {};
  JournalHeader header = {
      {"version", SAGELM_VERSION},
      {"command", std::string(command)},
      {"model", info.name},
      {"model_hash", model_hash(model_path(flags.common))},
      {"device", info.device},
      {"attention", info.attention},
      {"kv_cache", info.kv_cache},
      {"file_sha256", sha256_hex(data)},
      {"limit", flags.limit ? fmt::format("{}", *flags.limit) : "none"},
      {"batch_tokens", fmt::format("{}", flags.batch_tokens)},
  };
  header.insert(header.end(), own.begin(), own.end());
  return Journal::open(*flags.resume, header);
}

void run_with_progress(Model& model, const std::string& units, int64_t total,
                       const std::function<void(const Scorer&, const EvalCallback&)>& run) {
  const InterruptGuard guard;
  Progress progress("scoring", units, total);
  run([&model](std::span<const Model::ScoreInput> inputs) { return model.score(inputs); },
      [&progress](const EvalProgress& state) {
        progress.skip(state.resumed);
        progress.update(state.done, "perplexity " + format_figure(state.perplexity, 3));
        return !interrupted();
      });
}

Json eval_json(const ModelInfo& info, bool bos, const std::string& file, std::string_view bytes) {
  return {{"model", info.name},
          {"attention", info.attention},
          {"kv_cache", info.kv_cache},
          {"device", info.device},
          {"bos", bos},
          {"file", file},
          {"file_bytes", bytes.size()},
          {"file_sha256", sha256_hex(bytes)}};
}

std::string limit_note(const EvalFlags& flags) {
  return flags.limit ? fmt::format(" (--limit {})", *flags.limit) : "";
}

std::string format_figure(double value, int digits) {
  return std::isfinite(value) ? fmt::format("{:.{}f}", value, digits) : "undefined";
}

void report_interrupt(int64_t done, int64_t planned, std::string_view units,
                      const std::optional<std::string>& journal) {
  if (done >= planned) return;
  fail("interrupted: the result is partial, of {} of {} {}{}", done, planned, units,
       journal ? fmt::format("; the same command goes on from the journal {}", *journal) : "");
}

}  // namespace sagelm::cli
