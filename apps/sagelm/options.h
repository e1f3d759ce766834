// The flags that several subcommands share, in one table (options.cpp): a name, its default and its
// help are written once. A subcommand takes the groups it can use; the parser refuses the others,
// so that no flag is silently ignored.
#pragma once

#include <CLI/App.hpp>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "sagelm/sagelm.hpp"
#include "text/tokenizer.h"

namespace sagelm::cli {

struct CommonOptions {
  std::string model;               // empty: the demo model
  std::string random_weights;      // as in LoadOptions
  std::string attention = "sage";  // as --attention takes it
  bool no_smooth_k = false;
  std::string calibration;  // the file of sage-adaptive's choice; empty: in the cache directory
  std::string kv_cache = "auto";
  std::string device = "auto";
  int threads = 0;      // 0: one per core
  int64_t context = 0;  // 0: the model's own
  uint64_t seed = 0;
  std::optional<std::string> json;  // absent: no JSON; "-": standard output; else a file
  bool verbose = false;
};

// Groups of common flags, to be or-ed.
enum OptionGroup : unsigned {
  kModelGroup = 1,          // -m
  kKernelGroup = 2,         // --attention --no-smooth-k
  kContextGroup = 4,        // --ctx (a command for which it means something else defines its own)
  kSeedGroup = 8,           // --seed
  kJsonGroup = 16,          // --json [FILE]
  kVerboseGroup = 32,       // -v
  kRandomGroup = 64,        // --random-weights
  kCacheGroup = 128,        // --kv-cache
  kDeviceGroup = 256,       // --device --threads
  kCalibrationGroup = 512,  // --calibration
  kComputeGroup = kKernelGroup | kCalibrationGroup | kCacheGroup | kDeviceGroup,
};

// Adds the flags of groups to command. options must live as long as the command.
void add_common_options(CLI::App& command, CommonOptions& options, unsigned groups);

// -m, or the demo model: $SAGELM_DEMO_MODEL, else models/demo beside the executable's directory,
// share/sagelm/models/demo of its prefix, or models/demo here. Throws Error if there is none.
std::filesystem::path model_path(const CommonOptions& options);

// The tokenizer alone: data is checked and tokenized before any weights are read.
Tokenizer open_tokenizer(const CommonOptions& options);

// options as the engine takes them, without progress. Of sage-adaptive the choice that is kept, or
// where there is none fp16. Throws what stored_calibration throws (adaptive.h), and
// UsageError for flags that contradict each other.
LoadOptions load_options(const CommonOptions& options);

// Loads the model with a progress bar, its attention calibrated if that is still to be done; with
// -v says on stderr what was loaded. batch_tokens as in LoadOptions; 0 keeps its default; sessions
// likewise.
Model load_model(const CommonOptions& options, int64_t batch_tokens = 0, int64_t sessions = 0);

// A check for options whose empty value, as "$NAME" gives it where NAME is not set, cannot be
// meant.
std::string not_empty(const std::string& text);

// All of a file, or of standard input for "-". Throws Error naming the file.
std::string read_text_file(const std::string& path);

// The text that a command is about, on the command line or in a file. (CLI11's groups could say
// that one of the two is needed, but a group loops for ever over an empty argument.)
class TextOption {
 public:
  // Adds `name` TEXT and --file FILE. this must live as long as the command.
  void add(CLI::App& command, const std::string& name, const std::string& help);
  // Throws UsageError unless one of the two was given, and what read_text_file throws.
  std::string read() const;

 private:
  std::string text_;
  std::string path_;
  const CLI::Option* text_option_ = nullptr;
  const CLI::Option* file_option_ = nullptr;
};

}  // namespace sagelm::cli
