// A chat's turns, and the session that holds their tokens: what is in the KV cache already is not
// run again.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "json_output.h"
#include "sagelm/sagelm.hpp"
#include "text/chat_template.h"

namespace sagelm::cli {

// The next turn does not fit the context.
class ContextFull : public Error {
 public:
  using Error::Error;
};

enum class OnFull { kStop, kDropOldestTurns };

class Conversation {
 public:
  // model must outlive this.
  Conversation(Model& model, ChatTemplate chat_template, std::string system, OnFull on_full);

  // Asks user and takes the answer in as a turn, also one that was cut short. on_notice gets a
  // sentence for each thing that was done to make room. If on_text stopped it before the first
  // token there is no turn. Throws ContextFull with the counts and other Errors; the turns are then
  // as before.
  Generation ask(const std::string& user, const GenerateOptions& options,
                 const TextCallback& on_text,
                 const std::function<void(const std::string&)>& on_notice);

  void reset();                         // forgets the turns, keeps the system prompt
  void set_system(std::string system);  // forgets the turns
  bool empty() const { return turns_.empty(); }
  size_t num_turns() const { return turns_.size(); }
  // Removes the last turn and returns what the user said in it. There must be one.
  std::string undo();

  int64_t tokens_used() const { return static_cast<int64_t>(session_.ids().size()); }
  int64_t context() const { return session_.context(); }
  const std::vector<int32_t>& last_prompt_ids() const { return last_prompt_ids_; }

  // {"format", "version", "model", "system", "turns": [{"user", "answer"}]}
  Json to_json() const;
  // Replaces system prompt and turns. Throws Error if object is not such a conversation; this is
  // then as before.
  void from_json(const Json& object);

 private:
  struct Turn {
    std::string user;
    std::string answer;
    std::vector<int32_t> answer_ids;
    int64_t start = -1;  // tokens in the session before the turn; -1: not known
  };

  std::vector<int32_t> encode_all(const std::string& user) const;
  int64_t keep_common(std::span<const int32_t> ids);
  void make_room(const std::string& user, int64_t reserve,
                 const std::function<void(const std::string&)>& on_notice);

  Model& model_;
  ChatTemplate template_;
  std::string system_;
  OnFull on_full_;
  Session session_;
  std::vector<Turn> turns_;
  bool in_sync_ = true;  // session_ holds turns_ to the end of the last answer, token by token
  std::vector<int32_t> last_prompt_ids_;
};

}  // namespace sagelm::cli
