#include "conversation.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <utility>

namespace sagelm::cli {
namespace {

constexpr std::string_view kFormat = "sagelm-chat";
constexpr int kVersionNumber = 1;

std::string string_field(const Json& object, const char* name) {
  if (!object.is_object() || !object.contains(name) || !object[name].is_string()) {
    fail("the conversation has no text '{}'", name);
  }
  return object[name].get<std::string>();
}

}  // namespace

Conversation::Conversation(Model& model, ChatTemplate chat_template, std::string system,
                           OnFull on_full)
    : model_(model),
      template_(chat_template),
      system_(std::move(system)),
      on_full_(on_full),
      session_(model.start_session()) {}

// The whole conversation with user as its last turn.
std::vector<int32_t> Conversation::encode_all(const std::string& user) const {
  std::vector<Message> messages;
  if (!system_.empty()) messages.push_back({Role::kSystem, system_});
  for (const Turn& turn : turns_) {
    messages.push_back({Role::kUser, turn.user});
    messages.push_back({Role::kAssistant, turn.answer});
  }
  messages.push_back({Role::kUser, user});
  return template_.encode_prompt(messages);
}

Generation Conversation::ask(const std::string& user, const GenerateOptions& options,
                             const TextCallback& on_text,
                             const std::function<void(const std::string&)>& on_notice) {
  // An answer wants room too, but a turn is not dropped for more of it than a quarter.
  const int64_t reserve =
      on_full_ == OnFull::kStop ? 1 : std::clamp(context() / 4, int64_t{1}, options.max_tokens);
  const bool follows = in_sync_ && !turns_.empty();
  std::vector<int32_t> ids;
  if (follows) ids = template_.encode_next_turn(turns_.back().answer_ids, user);
  if (!follows || tokens_used() + static_cast<int64_t>(ids.size()) + reserve > context()) {
    if (!follows || on_full_ == OnFull::kDropOldestTurns) {
      make_room(user, reserve, on_notice);
      ids = encode_all(user);
      ids.erase(ids.begin(), ids.begin() + keep_common(ids));
      in_sync_ = false;
    } else {
      throw ContextFull(fmt::format(
          "the context is full: {} tokens are in use, this turn needs {} more and one for the "
          "answer, and the limit is {}",
          tokens_used(), ids.size(), context()));
    }
  }
  const int64_t start = tokens_used();
  last_prompt_ids_.assign(session_.ids().begin(), session_.ids().end());
  last_prompt_ids_.insert(last_prompt_ids_.end(), ids.begin(), ids.end());

  GenerateOptions all = options;
  for (std::string& stop : template_.stop_texts()) all.stop.push_back(std::move(stop));
  for (const int32_t id : template_.end_ids()) all.end_ids.push_back(id);
  Generation answer = session_.generate(ids, all, on_text);
  if (answer.ids.empty() && answer.stop_reason == StopReason::kCallback) {
    session_.truncate(start);
    return answer;
  }
  turns_.push_back({.user = user,
                    .answer = answer.text,
                    .answer_ids = answer.ids,
                    .start = follows && in_sync_ ? start : -1});
  in_sync_ = true;
  return answer;
}

// Cuts the session to what ids begin with too; the tokens of that.
int64_t Conversation::keep_common(std::span<const int32_t> ids) {
  const std::span<const int32_t> held = session_.ids();
  const int64_t common = std::ranges::mismatch(ids, held).in1 - ids.begin();
  session_.truncate(common);
  return common;
}

// Sees to it that user's turn and reserve tokens fit, if need be without the oldest turns.
void Conversation::make_room(const std::string& user, int64_t reserve,
                             const std::function<void(const std::string&)>& on_notice) {
  const std::vector<Turn> all = turns_;
  while (true) {
    const auto needed = static_cast<int64_t>(encode_all(user).size());
    if (needed + reserve <= context()) break;
    if (on_full_ == OnFull::kStop || turns_.empty()) {
      if (turns_.empty() && needed < context()) break;  // a short answer is better than none
      turns_ = all;
      throw ContextFull(fmt::format(
          "the context is full: the conversation with this turn takes {} tokens and at least one "
          "for the answer, and the limit is {}",
          needed, context()));
    }
    turns_.erase(turns_.begin());
  }
  if (turns_.size() == all.size()) return;
  for (Turn& turn : turns_) turn.start = -1;
  in_sync_ = false;
  on_notice(
      fmt::format("the context of {} tokens is full: dropped the oldest {} of {} turns and "
                  "read the rest again",
                  context(), all.size() - turns_.size(), all.size()));
}

void Conversation::reset() {
  turns_.clear();
  session_.truncate(0);
  in_sync_ = true;
}

void Conversation::set_system(std::string system) {
  system_ = std::move(system);
  reset();
}

std::string Conversation::undo() {
  Turn last = std::move(turns_.back());
  turns_.pop_back();
  if (in_sync_ && last.start >= 0) {
    session_.truncate(last.start);
  } else if (turns_.empty() && system_.empty()) {
    reset();
  } else {
    keep_common(encode_all(""));  // what comes before any next turn
    in_sync_ = false;
  }
  return std::move(last.user);
}

Json Conversation::to_json() const {
  Json turns = Json::array();
  for (const Turn& turn : turns_) turns.push_back({{"user", turn.user}, {"answer", turn.answer}});
  return {{"format", kFormat},
          {"version", kVersionNumber},
          {"model", model_.info().name},
          {"system", system_},
          {"turns", turns}};
}

void Conversation::from_json(const Json& object) {
  if (string_field(object, "format") != kFormat || !object.contains("version") ||
      object["version"] != kVersionNumber) {
    fail("it is not a conversation that this version of sagelm saved");
  }
  std::string system = string_field(object, "system");
  if (!object.contains("turns") || !object["turns"].is_array()) {
    fail("the conversation has no list 'turns'");
  }
  std::vector<Turn> turns;
  for (const Json& turn : object["turns"]) {
    turns.push_back({.user = string_field(turn, "user"),
                     .answer = string_field(turn, "answer"),
                     .answer_ids = {},
                     .start = -1});
  }
  system_ = std::move(system);
  turns_ = std::move(turns);
  session_.truncate(0);
  in_sync_ = turns_.empty();
}

}  // namespace sagelm::cli
