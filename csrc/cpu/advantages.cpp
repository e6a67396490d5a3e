// Group-relative advantages on the CPU: one hash look-up per reward and no sort.
#include "vectors.h"

#include <unordered_map>
#include <vector>

namespace fastrl {
namespace {

template <typename T>
void advantages_typed(const AdvantageArgs& a) {
  const T* rewards = static_cast<const T*>(a.rewards);
  std::unordered_map<int64_t, int64_t> index;
  std::vector<int64_t> group_of(a.count);
  std::vector<Moments> groups;
  Moments batch;
  for (int64_t i = 0; i < a.count; ++i) {
    if (i > 0 && a.group_ids[i] == a.group_ids[i - 1]) {  // completions of a prompt mostly stand together
      group_of[i] = group_of[i - 1];
    } else {
      const auto [it, is_new] = index.try_emplace(a.group_ids[i], static_cast<int64_t>(groups.size()));
      if (is_new) groups.emplace_back();
      group_of[i] = it->second;
    }
    const double r = rewards[i];
    if (r != r) continue;
    groups[group_of[i]].add(r);
    batch.add(r);
  }
  for (int64_t i = 0; i < a.count; ++i) {
    const double r = rewards[i];
    if (r != r) continue;
    groups[group_of[i]].squares += groups[group_of[i]].centred_square(r);
    batch.squares += batch.centred_square(r);
  }
  std::vector<double> divisors;
  divisors.reserve(groups.size());
  for (const Moments& group : groups) divisors.push_back(group_divisor(group, batch, a));
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t group = group_of[i];
    static_cast<T*>(a.advantages)[i] = static_cast<T>(group_advantage(rewards[i], groups[group], divisors[group], a));
  }
}

}  // namespace

void group_advantages(const AdvantageArgs& a) { a.fp64 ? advantages_typed<double>(a) : advantages_typed<float>(a); }

}  // namespace fastrl
