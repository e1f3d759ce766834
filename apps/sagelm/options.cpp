#include "options.h"

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>

#include "adaptive.h"
#include "base/error.h"
#include "checkpoint/checkpoint.h"
#include "progress.h"

namespace sagelm::cli {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxThreads = 1024;
constexpr int64_t kProgressSteps = 1000;

// One common flag. add binds the value, whose default is CommonOptions' own, and its range.
struct CommonFlag {
  OptionGroup group;
  const char* name;
  const char* value_name;    // as the help shows it
  const char* default_text;  // likewise
  const char* help;
  CLI::Option* (*add)(CLI::App& command, CommonOptions& options, const CommonFlag& flag);
};

template <auto member>
CLI::Option* add_value(CLI::App& command, CommonOptions& options, const CommonFlag& flag) {
  return command.add_option(flag.name, options.*member, flag.help);
}

template <auto member>
CLI::Option* add_switch(CLI::App& command, CommonOptions& options, const CommonFlag& flag) {
  return command.add_flag(flag.name, options.*member, flag.help);
}

template <auto member>
CLI::Option* add_name(CLI::App& command, CommonOptions& options, const CommonFlag& flag) {
  return add_value<member>(command, options, flag)->check(not_empty);
}

CLI::Option* add_threads(CLI::App& command, CommonOptions& options, const CommonFlag& flag) {
  return add_value<&CommonOptions::threads>(command, options, flag)
      ->check(CLI::Range(1, kMaxThreads));
}

CLI::Option* add_context(CLI::App& command, CommonOptions& options, const CommonFlag& flag) {
  return add_value<&CommonOptions::context>(command, options, flag)
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
}

CLI::Option* add_kv_cache(CLI::App& command, CommonOptions& options, const CommonFlag& flag) {
  return add_value<&CommonOptions::kv_cache>(command, options, flag)
      ->check(CLI::IsMember({"auto", "fp16", "int8", "int4"}));
}

CLI::Option* add_seed(CLI::App& command, CommonOptions& options, const CommonFlag& flag) {
  // The conversion alone would take -1, and all that is larger, for 2^64 - 1.
  return add_value<&CommonOptions::seed>(command, options, flag)
      ->check([](const std::string& text) {
        if (text.empty()) return not_empty(text);
        if (text.starts_with('-')) return "a seed is 0 or more, not " + text;
        errno = 0;
        std::strtoull(text.c_str(), nullptr, 10);
        return errno == ERANGE ? "a seed is 18446744073709551615 at most, not " + text
                               : std::string();
      });
}

CLI::Option* add_json(CLI::App& command, CommonOptions& options, const CommonFlag& flag) {
  return command
      .add_option_function<std::vector<std::string>>(
          flag.name,
          [&options](const std::vector<std::string>& values) {
            options.json = values.empty() || values[0].empty() ? "-" : values[0];
          },
          flag.help)
      ->expected(0, 1)
      ->default_str("-");
}

const std::array kCommonFlags = {
    CommonFlag{kModelGroup, "-m,--model", "MODEL", "the demo model",
               "checkpoint: a Hugging Face directory or a .safetensors file",
               add_name<&CommonOptions::model>},
    CommonFlag{kRandomGroup, "--random-weights", "NAME[:bf16]", "",
               "an architecture with made-up FP16 (or BF16) weights in place of a checkpoint: "
               "llama2-7b, llama2-13b, llama3-8b, llama3.2-1b, tinyllama-1.1b or llama-160m",
               add_name<&CommonOptions::random_weights>},
    CommonFlag{kKernelGroup, "--attention", "NAME", "sage",
               "attention kernel: fp16, sage1[-t|-b|-vt|-vb], sage2[-8b|-4b], sage (the best of "
               "them for the device), sage-adaptive (for each layer the fastest that is accurate "
               "enough there, see calibrate), or one for each layer, separated by /",
               add_value<&CommonOptions::attention>},
    CommonFlag{kKernelGroup, "--no-smooth-k", "", "", "quantize K as it is, its mean left in",
               add_switch<&CommonOptions::no_smooth_k>},
    CommonFlag{kCalibrationGroup, "--calibration", "FILE", "in the cache directory",
               "where the choice of sage-adaptive is kept; made and written if it is not there",
               add_name<&CommonOptions::calibration>},
    CommonFlag{kCacheGroup, "--kv-cache", "auto|fp16|int8|int4", "auto",
               "KV cache: fp16, int8 (8-bit keys and values, half the memory; with sage2), int4 "
               "(4-bit keys, 8-bit values; with sage2 and sage2-4b), or auto "
               "(int8 where it can be had)",
               add_kv_cache},
    CommonFlag{kDeviceGroup, "--device", "auto|cpu|cuda[:N]", "auto", "where to compute",
               add_value<&CommonOptions::device>},
    CommonFlag{kDeviceGroup, "--threads", "N", "one per core", "CPU threads", add_threads},
    CommonFlag{kContextGroup, "--ctx", "N", "the model's own", "context length in tokens",
               add_context},
    CommonFlag{kSeedGroup, "--seed", "N", "0", "seed of the random draws", add_seed},
    CommonFlag{kJsonGroup, "--json", "[FILE]", "",
               "write the result as one JSON object to FILE, or alone to standard output",
               add_json},
    CommonFlag{kVerboseGroup, "-v,--verbose", "", "", "say on stderr what was loaded and how",
               add_switch<&CommonOptions::verbose>},
};

fs::path executable_directory() {
  std::error_code error;
  const fs::path executable = fs::read_symlink("/proc/self/exe", error);
  return error ? fs::path(".") : executable.parent_path();
}

}  // namespace

void add_common_options(CLI::App& command, CommonOptions& options, unsigned groups) {
  for (const CommonFlag& flag : kCommonFlags) {
    if ((groups & flag.group) == 0) continue;
    CLI::Option* option = flag.add(command, options, flag);
    std::string shown = flag.value_name;
    if (*flag.default_text != '\0') shown += std::string(" (default: ") + flag.default_text + ")";
    if (!shown.empty()) option->option_text(shown);
  }
}

fs::path model_path(const CommonOptions& options) {
  if (!options.model.empty()) return options.model;
  if (const char* demo = std::getenv("SAGELM_DEMO_MODEL"); demo != nullptr && *demo != '\0') {
    return demo;
  }
  const fs::path beside = executable_directory();
  for (const fs::path& candidate :
       {beside / "../models/demo", beside / "../share/sagelm/models/demo",
        fs::path("models/demo")}) {
    std::error_code error;
    if (fs::exists(candidate / "config.json", error)) return candidate.lexically_normal();
  }
  throw UsageError("no demo model was found beside the program: name a checkpoint with -m MODEL");
}

Tokenizer open_tokenizer(const CommonOptions& options) {
  return Tokenizer::open(checkpoint_directory(model_path(options)));
}

LoadOptions load_options(const CommonOptions& options) {
  LoadOptions load;
  if (options.random_weights.empty()) {
    load.model = model_path(options);
  } else if (!options.model.empty()) {
    throw UsageError("-m names a checkpoint and --random-weights makes one up: use one of them");
  }
  check_calibration_option(options, {&options.attention, 1});
  load.random_weights = options.random_weights;
  load.attention = options.attention;
  load.smooth_k = !options.no_smooth_k;
  load.kv_cache = options.kv_cache;
  load.device = options.device;
  load.threads = options.threads;
  load.context = options.context;
  if (is_adaptive(options)) {
    if (!options.random_weights.empty()) {
      fail_usage("{} cannot be calibrated with made-up weights: name an attention", kAdaptive);
    }
    if (const std::optional<Calibration> stored = stored_calibration(options)) {
      load.attention = stored->attention();
    } else {  // what runs everywhere, until load_model has chosen
      load.attention = "fp16";
      load.kv_cache = "auto";
    }
  }
  return load;
}

Model load_model(const CommonOptions& options, int64_t batch_tokens, int64_t sessions) {
  LoadOptions load = load_options(options);
  if (batch_tokens > 0) load.batch_tokens = batch_tokens;
  load.sessions = sessions;
  Progress progress("loading", "", kProgressSteps);
  load.progress = [&progress](double fraction) {
    progress.update(static_cast<int64_t>(fraction * kProgressSteps));
  };
  const auto begin = std::chrono::steady_clock::now();
  Model model = Model::load(load);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (is_adaptive(options)) {
    model.set_attention(resolve_attention(model, options), load.smooth_k, options.kv_cache);
  }
  if (options.verbose) {
    const ModelInfo info = model.info();
    std::cerr << fmt::format(
        "model {} ({}, {} parameters, {})\ndevice {}\nattention {}\ncontext {} of {} tokens, "
        "KV cache {}, {} bytes per token\nweights {} bytes, loaded in {:.2f} s ({:.2f} GB/s)\n",
        info.name, info.architecture, info.num_parameters, info.dtype, info.device, info.attention,
        info.context, info.max_context, info.kv_cache, info.kv_bytes_per_token, info.weight_bytes,
        seconds, static_cast<double>(info.checkpoint_bytes) / seconds * 1e-9);
  }
  return model;
}

std::string not_empty(const std::string& text) { return text.empty() ? "the value is empty" : ""; }

std::string read_text_file(const std::string& path) {
  if (path == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
  std::error_code error;
  if (fs::is_directory(path, error)) fail("cannot read {}: it is a directory", path);
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot read {}: {}", path, std::strerror(errno));
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (file.bad()) fail("cannot read {}: {}", path, std::strerror(errno));
  return text;
}

void TextOption::add(CLI::App& command, const std::string& name, const std::string& help) {
  text_option_ = command.add_option(name, text_, help)->option_text("TEXT");
  file_option_ =
      command.add_option("--file", path_, "a file that holds it instead; -: standard input")
          ->option_text("FILE")
          ->check(not_empty);
}

std::string TextOption::read() const {
  const bool has_file = file_option_->count() > 0;
  if (has_file == (text_option_->count() > 0)) {
    fail_usage("give either {} or --file", text_option_->get_name());
  }
  return has_file ? read_text_file(path_) : text_;
}

}  // namespace sagelm::cli
