// sagelm chat: a conversation with a model, on a terminal or through a pipe.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/utf8.h"
#include "commands.h"
#include "conversation.h"
#include "interrupt.h"
#include "json_output.h"
#include "line_reader.h"
#include "options.h"
#include "sagelm/sagelm.hpp"
#include "sampling_options.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace sagelm::cli {
namespace {

constexpr const char* kHelp =
    "/reset          forget the conversation, keep the system prompt\n"
    "/system TEXT    set the system prompt (none without TEXT) and start anew\n"
    "/save FILE      write the conversation to FILE\n"
    "/load FILE      go on with a conversation that was saved\n"
    "/undo           take back the last turn\n"
    "/regen          answer the last turn again, with another draw\n"
    "/stats          tokens and speed so far\n"
    "/help           this list\n"
    "/exit           leave (Ctrl-D does too)\n"
    "End a line with \\ to go on in the next one, or put several between lines of \"\"\".\n"
    "Ctrl-C stops an answer.\n";

struct ChatFlags {
  CommonOptions common;
  GenerationFlags generation;
  std::string system;
  std::string prompt;
  std::string chat_template;
  std::string on_full = "stop";
  bool show_prompt_tokens = false;
};

void say(const std::string& text) {
  std::fputs((text + "\n").c_str(), stderr);
  std::fflush(stderr);
}

class Chat {
 public:
  explicit Chat(const ChatFlags& flags)
      : flags_(flags),
        options_(effective_options(flags.generation, flags.common.seed)),
        output_(flags.common.json),
        model_(load_model(flags.common, 0, 1)),
        template_(flags.chat_template.empty()
                      ? ChatTemplate::detect(model_.tokenizer())
                      : ChatTemplate::by_name(flags.chat_template, model_.tokenizer())),
        conversation_(model_, template_, flags.system,
                      flags.on_full == "stop" ? OnFull::kStop : OnFull::kDropOldestTurns) {}

  void run_once(const std::string& prompt);
  void run_lines();

 private:
  void banner() const;
  void answer(const std::string& user);
  bool command(const std::string& line);  // false: leave
  void save(const std::string& path) const;
  void load(const std::string& path);
  std::string stats() const;
  void finish();

  const ChatFlags& flags_;
  GenerateOptions options_;
  ResultOutput output_;
  Model model_;
  ChatTemplate template_;
  Conversation conversation_;
  uint64_t draws_ = 0;  // answers so far: each has a seed of its own
  int64_t prefill_tokens_ = 0;
  int64_t decode_steps_ = 0;
  double prefill_seconds_ = 0;
  double decode_seconds_ = 0;
};

double rate(int64_t count, double seconds) {
  return count > 0 && seconds > 0 ? static_cast<double>(count) / seconds : 0.0;
}

void Chat::banner() const {
  const ModelInfo info = model_.info();
  say(fmt::format(
      "model      {} ({}, {:.1f}M parameters)\nattention  {}\nKV cache   {}, {} bytes "
      "per token\ndevice     {}\n"
      "context    {} tokens of {}\ntemplate   {}\nsampling   {}\nseed       {}",
      info.name, info.dtype, static_cast<double>(info.num_parameters) / 1e6, info.attention,
      info.kv_cache, info.kv_bytes_per_token, info.device, info.context, info.max_context,
      template_.name(), describe_sampling(options_.sampling), options_.sampling.seed));
}

void Chat::answer(const std::string& user) {
  GenerateOptions options = options_;
  options.sampling.seed += draws_++;
  clear_interrupt();
  bool shown_prompt = !flags_.show_prompt_tokens;
  bool started = false;
  const Generation generation = conversation_.ask(
      user, options,
      [&](std::string_view text) {
        if (!shown_prompt) {
          say(fmt::format("prompt ids: {}", fmt::join(conversation_.last_prompt_ids(), " ")));
          shown_prompt = true;
        }
        if (!started) text.remove_prefix(std::min(text.find_first_not_of(" \n"), text.size()));
        if (!text.empty()) {
          started = true;
          output_.text(text);
        }
        return !interrupted();
      },
      [](const std::string& notice) { say(notice); });
  output_.text("\n");
  prefill_tokens_ += generation.prefill_tokens;
  prefill_seconds_ += generation.prefill_seconds;
  decode_steps_ += generation.decode_steps;
  decode_seconds_ += generation.decode_seconds;
  if (generation.stop_reason == StopReason::kCallback) say("[stopped]");
  if (generation.stop_reason == StopReason::kMaxTokens) {
    say(fmt::format("[cut after {} tokens, see -n]", generation.ids.size()));
  }
  if (generation.stop_reason == StopReason::kContextFull) {
    say(fmt::format("[cut: the context is full, {} of {} tokens are in use]",
                    conversation_.tokens_used(), conversation_.context()));
  }
  clear_interrupt();
}

void Chat::save(const std::string& path) const {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << conversation_.to_json().dump(2, ' ', false, Json::error_handler_t::replace) << '\n';
  file.close();
  if (!file) fail("cannot write {}", path);
  say(fmt::format("saved {} turns to {}", conversation_.num_turns(), path));
}

void Chat::load(const std::string& path) {
  const std::string bytes = read_text_file(path);
  const Json object = Json::parse(bytes, nullptr, false);
  if (object.is_discarded()) fail("cannot load {}: it is not JSON", path);
  try {
    conversation_.from_json(object);
  } catch (const Error& error) {
    fail("cannot load {}: {}", path, error.what());
  }
  say(fmt::format("loaded {} turns from {}", conversation_.num_turns(), path));
}

std::string Chat::stats() const {
  const ModelInfo info = model_.info();
  return fmt::format(
      "{} turns, {} of {} tokens in use; read {} tokens at {:.1f} tokens/s, wrote {} at {:.1f} "
      "tokens/s; KV cache {}, {} bytes per token",
      conversation_.num_turns(), conversation_.tokens_used(), conversation_.context(),
      prefill_tokens_, rate(prefill_tokens_, prefill_seconds_), decode_steps_,
      rate(decode_steps_, decode_seconds_), info.kv_cache, info.kv_bytes_per_token);
}

bool Chat::command(const std::string& line) {
  const size_t space = line.find_first_of(" \t");
  const std::string name = line.substr(0, space);
  std::string argument;
  if (space != std::string::npos) {
    const size_t first = line.find_first_not_of(" \t", space);
    if (first != std::string::npos) argument = line.substr(first);
    while (argument.ends_with(' ') || argument.ends_with('\t')) argument.pop_back();
  }
  const bool takes_argument = name == "/system" || name == "/save" || name == "/load";
  if (!argument.empty() && !takes_argument) {
    say(fmt::format("{} takes no argument; /help lists the commands", name));
  } else if (argument.empty() && takes_argument && name != "/system") {
    say(fmt::format("{} needs a file's name", name));
  } else if (name == "/exit") {
    return false;
  } else if (name == "/help") {
    std::fputs(kHelp, stderr);
  } else if (name == "/reset") {
    conversation_.reset();
    say("the conversation is empty");
  } else if (name == "/system") {
    conversation_.set_system(argument);
    say(argument.empty() ? "no system prompt; the conversation is empty"
                         : "system prompt set; the conversation is empty");
  } else if (name == "/save") {
    save(argument);
  } else if (name == "/load") {
    load(argument);
  } else if (name == "/stats") {
    say(stats());
  } else if (name == "/undo" || name == "/regen") {
    if (conversation_.empty()) {
      say("there is no turn yet");
    } else {
      const std::string user = conversation_.undo();
      if (name == "/regen") {
        answer(user);
      } else {
        say("took back: " + printable(user));  // a loaded conversation's is foreign
      }
    }
  } else {
    say(fmt::format("unknown command {}; /help lists the commands", name));
  }
  return true;
}

void Chat::finish() {
  if (output_.wants_json()) {
    const ModelInfo info = model_.info();
    Json result = conversation_.to_json();
    result["attention"] = info.attention;
    result["device"] = info.device;
    result["kv_cache"] = info.kv_cache;
    result["kv_bytes_per_token"] = info.kv_bytes_per_token;
    result["context"] = info.context;
    result["template"] = template_.name();
    result["seed"] = options_.sampling.seed;
    result["sampling"] = sampling_json(options_.sampling);
    result["tokens_used"] = conversation_.tokens_used();
    result["prefill_tokens_per_second"] = rate(prefill_tokens_, prefill_seconds_);
    result["decode_tokens_per_second"] = rate(decode_steps_, decode_seconds_);
    output_.json(result);
  }
  say(stats());
}

void Chat::run_once(const std::string& prompt) {
  banner();
  const InterruptGuard guard;
  answer(prompt);
  finish();
}

void Chat::run_lines() {
  banner();
  const InterruptGuard guard;
  LineReader reader;
  if (reader.is_terminal()) say("Say something; /help lists the commands.");
  std::string text;
  bool leaving = false;  // Ctrl-C was pressed once
  int failed = 0;
  while (true) {
    const LineReader::Status status = reader.read(text);
    if (status == LineReader::Status::kEnd) break;
    if (status == LineReader::Status::kInterrupted) {
      if (leaving || !reader.is_terminal()) break;
      leaving = true;
      say("Ctrl-C again, Ctrl-D or /exit leaves.");
      continue;
    }
    leaving = false;
    if (text.find_first_not_of(" \t\r\n") == std::string::npos) continue;
    try {
      if (text.front() != '/') {
        answer(text);
      } else if (!command(text)) {
        break;
      }
    } catch (const WriteError&) {
      throw;  // nobody is listening any more
    } catch (const Error& error) {
      say(fmt::format("sagelm: {}", error.what()));
      ++failed;
    }
  }
  finish();
  // At a terminal the user saw it; a script looks at the exit status.
  if (failed > 0 && !reader.is_terminal()) fail("{} of the lines could not be done", failed);
}

void run_chat(const ChatFlags& flags, bool has_prompt) {
  if (has_prompt && flags.prompt.find_first_not_of(" \t\r\n") == std::string::npos) {
    throw UsageError("--prompt is empty: there is nothing to answer");
  }
  Chat chat(flags);
  if (has_prompt) {
    chat.run_once(flags.prompt);
  } else {
    chat.run_lines();
  }
}

}  // namespace

void add_chat(CLI::App& app) {
  CLI::App* command = app.add_subcommand("chat", "Talk with a model");
  auto flags = std::make_shared<ChatFlags>();
  add_common_options(
      *command, flags->common,
      kModelGroup | kComputeGroup | kContextGroup | kSeedGroup | kJsonGroup | kVerboseGroup);
  const CLI::Option* prompt =
      command->add_option("--prompt", flags->prompt, "answer this once and exit")
          ->option_text("TEXT");
  command->add_option("--system", flags->system, "system prompt")->option_text("TEXT");
  command
      ->add_option("--chat-template", flags->chat_template,
                   "one of " + ChatTemplate::known_names() + " (default: the checkpoint's own)")
      ->option_text("NAME")
      ->check(not_empty);
  command->add_option("--on-full", flags->on_full, "what to do when the context is full")
      ->option_text("stop|drop-oldest-turns (default: stop)")
      ->check(CLI::IsMember({"stop", "drop-oldest-turns"}));
  command->add_flag("--show-prompt-tokens", flags->show_prompt_tokens,
                    "write each prompt's token ids to stderr");
  add_generation_options(*command, flags->generation, 512);
  command->callback([flags, prompt] { run_chat(*flags, prompt->count() > 0); });
}

}  // namespace sagelm::cli
