#include "compare_task.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <ctime>
#include <deque>
#include <filesystem>
#include <set>

#include "adaptive.h"
#include "base/error.h"
#include "compare_output.h"
#include "eval/compare_layers.h"
#include "eval/dataset.h"
#include "eval/model_hash.h"
#include "eval/report.h"
#include "eval/report_machine.h"
#include "eval/sha256.h"
#include "interrupt.h"
#include "progress.h"

namespace sagelm::cli {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMostSettings = 16;

// NAME[+no-smooth-k][+kv-cache=TYPE][+device=DEVICE]; what it does not say is as in common.
CompareSettingFlags parse_setting(std::string_view text, const CommonOptions& common) {
  CompareSettingFlags setting{.name = std::string(text), .common = common};
  size_t end = text.find('+');
  setting.common.attention = text.substr(0, end);
  if (setting.common.attention.empty()) fail_usage("the setting '{}' names no attention", text);
  std::set<std::string_view> seen;
  while (end != std::string_view::npos) {
    text.remove_prefix(end + 1);
    end = text.find('+');
    const std::string_view option = text.substr(0, end);
    const size_t equals = option.find('=');
    const std::string_view key = option.substr(0, equals);
    const std::string_view value =
        equals == std::string_view::npos ? std::string_view() : option.substr(equals + 1);
    if (!seen.insert(key).second) {
      fail_usage("the setting {} has {} twice", setting.name, key);
    }
    if (option == "no-smooth-k") {
      setting.common.no_smooth_k = true;
    } else if (key == "kv-cache" &&
               (value == "auto" || value == "fp16" || value == "int8" || value == "int4")) {
      setting.common.kv_cache = value;
    } else if (key == "device" && !value.empty()) {
      setting.common.device = value;
    } else {
      fail_usage(
          "unknown option '{}' in the setting {}: use no-smooth-k, kv-cache=auto|fp16|int8|int4 or "
          "device=auto|cpu|cuda[:N]",
          option, setting.name);
    }
  }
  return setting;
}

// The settings' models. Those on one device share one: only the attention kernel and the type of
// cache are switched.
class Models {
 public:
  Models(const std::vector<CompareSettingFlags>& settings, const EvalFlags& flags, int64_t context,
         int64_t longest) {
    for (const CompareSettingFlags& setting : settings) {
      auto found = std::find_if(loaded_.begin(), loaded_.end(), [&setting](const Loaded& other) {
        return other.device == setting.common.device;
      });
      if (found == loaded_.end()) {
        CommonOptions common = setting.common;
        common.context = context;
        loaded_.push_back(
            {.device = common.device, .model = load_for_eval(common, flags, longest)});
        found = std::prev(loaded_.end());
      }
      users_.push_back({.model = &found->model,
                        .attention = resolve_attention(found->model, setting.common),
                        .smooth_k = !setting.common.no_smooth_k,
                        .kv_cache = setting.common.kv_cache});
    }
  }

  // The setting's model, its kernel switched on.
  Model& use(size_t setting) {
    const User& user = users_[setting];
    user.model->set_attention(user.attention, user.smooth_k, user.kv_cache);
    return *user.model;
  }

 private:
  struct Loaded {
    std::string device;
    Model model;
  };
  struct User {
    Model* model;
    std::string attention;
    bool smooth_k;
    std::string kv_cache;
  };
  std::deque<Loaded> loaded_;  // users point into it
  std::vector<User> users_;
};

SettingInfo describe_setting(const CompareSettingFlags& setting, const ModelInfo& info) {
  return {.name = setting.name,
          .attention = info.attention,
          .device = info.device,
          .kv_cache = info.kv_cache,
          .smooth_k = !setting.common.no_smooth_k,
          .memory_bytes = info.weight_bytes + info.kv_bytes + info.activation_bytes};
}

Comparison compare_settings(const CompareTask& task,
                            const std::vector<CompareSettingFlags>& settings, Models& models,
                            const CompareOptions& options, Journal* journal) {
  std::vector<CompareSetting> compared;
  for (size_t s = 0; s < settings.size(); ++s) {
    compared.push_back(
        {.name = settings[s].name,
         .scorer = [&models, s](std::span<const Model::ScoreInput> inputs,
                                const Model::DistributionCallback& on_block, int64_t shared) {
           models.use(s).score_distributions(inputs, on_block, shared);
         }});
  }
  Progress progress("comparing", task.units + " × settings",
                    static_cast<int64_t>(task.inputs.size() * settings.size()));
  return run_comparison(
      task.inputs, compared, options,
      [&task](int64_t index) { return fmt::format("{} {}", task.unit, index + 1); },
      [&progress](const EvalProgress& state) {
        progress.skip(state.resumed);
        progress.update(state.done, "perplexity " + format_figure(state.perplexity, 3));
        return !interrupted();
      },
      journal);
}

void compare_layers(const CompareFlags& flags, const CompareTask& task, Models& models,
                    CompareResult& result) {
  std::vector<std::span<const int32_t>> texts;
  const int64_t most = std::min(kProbedTokens, flags.eval.batch_tokens);
  int64_t tokens = 0;
  for (const Model::ScoreInput& input : task.inputs) {
    if (static_cast<int64_t>(texts.size()) == flags.layer_windows) break;
    texts.push_back(input.ids.first(std::min(static_cast<size_t>(most), input.ids.size())));
    tokens += static_cast<int64_t>(texts.back().size());
  }
  Progress progress("probing attention", "settings", static_cast<int64_t>(result.settings.size()));
  for (size_t s = 0; s < result.settings.size(); ++s) {
    result.layers.push_back(measure_layers(texts, models.use(s), [] { return !interrupted(); }));
    progress.update(static_cast<int64_t>(s) + 1);
    if (interrupted()) {
      result.layers.clear();  // a part of the settings, or of the texts, compares nothing
      return;
    }
  }
  result.layers_note = fmt::format(
      "Output of each layer's attention against float64 attention of the same Q, K and V (rounded "
      "to FP16), each setting on those of its own run: {} {} of {} tokens together.",
      texts.size(), texts.size() == 1 ? task.unit : task.units, tokens);
}

std::string utc_now() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::array<char, 32> text{};
  const size_t length = std::strftime(text.data(), text.size(), "%Y-%m-%d %H:%M UTC", &parts);
  return {text.data(), length};
}

// An argument as a shell takes it.
std::string shell_word(const std::string& argument) {
  constexpr std::string_view kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=,./:@%";
  if (!argument.empty() && argument.find_first_not_of(kPlain) == std::string::npos) {
    return argument;
  }
  std::string quoted = "'";
  for (const char c : argument) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

// The command line of this process.
std::string command_line() {
  const std::string bytes = read_text_file("/proc/self/cmdline");
  std::string line;
  for (size_t begin = 0; begin < bytes.size();) {
    const size_t end = std::min(bytes.find('\0', begin), bytes.size());
    if (begin > 0) line += ' ';
    line += shell_word(bytes.substr(begin, end - begin));
    begin = end + 1;
  }
  return line;
}

// What a report must say of a run so that it can be repeated.
struct RunFacts {
  std::string model_hash;
  std::string command = command_line();
  std::string machine = describe_machine();
  std::string measured = utc_now();
};

// The checkpoint by hash, its configuration by hash and its weights by size.
std::vector<std::pair<std::string, std::string>> checkpoint_facts(const fs::path& model,
                                                                  const std::string& hash) {
  const bool is_directory = fs::is_directory(model);
  const fs::path directory = is_directory ? model : model.parent_path();
  const std::string config = (directory / "config.json").string();
  std::vector<std::pair<std::string, std::string>> facts = {
      {"model hash", hash}, {"config sha256", sha256_hex(read_text_file(config))}};
  std::vector<fs::path> weights;
  if (is_directory) {
    for (const auto& entry : fs::directory_iterator(directory)) {
      if (entry.path().extension() == ".safetensors") weights.push_back(entry.path());
    }
    std::sort(weights.begin(), weights.end());
  } else {
    weights.push_back(model);
  }
  for (const fs::path& file : weights) {
    facts.emplace_back("weights",
                       fmt::format("{}, {} bytes", file.filename().string(), fs::file_size(file)));
  }
  return facts;
}

}  // namespace

std::vector<CompareSettingFlags> parse_settings(const CommonOptions& common) {
  std::vector<CompareSettingFlags> settings;
  std::string_view list = common.attention;
  for (bool more = true; more;) {
    const size_t comma = list.find(',');
    settings.push_back(parse_setting(list.substr(0, comma), common));
    more = comma != std::string_view::npos;
    if (more) list.remove_prefix(comma + 1);
  }
  if (settings.size() < 2) {
    fail_usage("compare needs two settings or more, as in --attention fp16,sage2");
  }
  if (settings.size() > kMostSettings) {
    fail_usage("compare takes {} settings at most, not {}", kMostSettings, settings.size());
  }
  std::vector<std::string> attentions;
  for (CompareSettingFlags& setting : settings) {
    attentions.push_back(setting.common.attention);
    if (!is_adaptive(setting.common)) setting.common.calibration.clear();
  }
  check_calibration_option(common, attentions);
  for (const CompareSettingFlags& setting : settings) Model::inspect(load_options(setting.common));
  return settings;
}

void run_task(const CompareFlags& flags, const CompareTask& task,
              const std::vector<CompareSettingFlags>& settings, ResultOutput& output) {
  Models models(settings, flags.eval, task.context, longest_input(task.inputs));
  CompareResult result;
  for (size_t s = 0; s < settings.size(); ++s) {
    result.settings.push_back(describe_setting(settings[s], models.use(s).info()));
  }
  const ModelInfo info = models.use(0).info();
  JournalHeader header = task.journal_header;
  for (const SettingInfo& setting : result.settings) {
    header.emplace_back(
        "setting " + setting.name,
        fmt::format("{}; {}; {} cache", setting.attention, setting.device, setting.kv_cache));
  }
  std::optional<Journal> journal =
      open_journal(flags.eval, "compare " + task.name, info, task.data, header);
  const InterruptGuard guard;
  result.comparison = compare_settings(task, settings, models,
                                       {.vocab_size = info.vocab_size,
                                        .batch_tokens = flags.eval.batch_tokens,
                                        .groups = task.groups,
                                        .choices = task.choices},
                                       journal ? &*journal : nullptr);
  const Comparison& comparison = result.comparison;
  result.metrics = task.metrics(comparison);
  for (const SettingScores& scores : comparison.settings) {
    result.distances.push_back(distance(comparison.settings[0], scores));
  }
  if (flags.layers && !comparison.partial()) compare_layers(flags, task, models, result);

  result.title = fmt::format("{} of {} under {} settings", task.title, info.name, settings.size());
  result.units = task.units;
  result.facts = task.facts;
  result.facts.insert(result.facts.begin(), {"model", info.name});
  const fs::path model = model_path(flags.eval.common);
  const RunFacts run{.model_hash = model_hash(model)};
  result.json = {{"task", task.name},           {"version", SAGELM_VERSION},
                 {"command", run.command},      {"measured", run.measured},
                 {"machine", run.machine},      {"model", info.name},
                 {"model_hash", run.model_hash}};
  result.json.update(task.json);
  result.json.update({{"limit", flags.eval.limit ? Json(*flags.eval.limit) : Json()},
                      {"batch_tokens", flags.eval.batch_tokens}});
  output.text(compare_text(result));
  if (flags.report) {
    std::vector<std::pair<std::string, std::string>> facts =
        checkpoint_facts(model, run.model_hash);
    facts.emplace_back("machine", run.machine);
    facts.emplace_back("program", "sagelm " SAGELM_VERSION);
    facts.emplace_back("measured", run.measured);
    const fs::path page =
        write_report(*flags.report, render_report(compare_report(result, facts, run.command)));
    output.text(fmt::format("report         {}\n", page.string()));
    result.json["report"] = page.string();
  }
  output.json(compare_json(result));
  report_interrupt(comparison.inputs(), comparison.inputs_planned, task.units, flags.eval.resume);
}

}  // namespace sagelm::cli
