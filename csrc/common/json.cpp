// SPDX-License-Identifier: Apache-2.0
#include "common/json.h"

#include <cstdio>
#include <stdexcept>

namespace knnfast {
namespace {

class Parser {
 public:
  Parser(const char* begin, const char* end) : at_(begin), begin_(begin), end_(end) {}

  Json document() {
    Json value = parse(0);
    space();
    if (at_ != end_) fail("something follows the document");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) {
    throw std::runtime_error(what + " at byte " + std::to_string(at_ - begin_));
  }
  void space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }
  char peek() {
    space();
    if (at_ == end_) fail("it ends early");
    return *at_;
  }
  void expect(char c) {
    if (peek() != c) fail(std::string("'") + c + "' is missing");
    ++at_;
  }

  Json parse(int depth) {
    if (depth > 16) fail("nested too deeply");
    Json v;
    const char c = peek();
    if (c == '{') {
      v.kind = Json::object;
      ++at_;
      if (peek() == '}') return ++at_, v;
      for (;; ++at_) {
        if (peek() != '"') fail("a name is missing");
        std::string name = text();
        expect(':');
        if (!v.fields.emplace(name, parse(depth + 1)).second) fail("a name comes twice");
        if (peek() == '}') return ++at_, v;
        if (*at_ != ',') fail("',' is missing");
      }
    }
    if (c == '[') {
      v.kind = Json::array;
      ++at_;
      if (peek() == ']') return ++at_, v;
      for (;; ++at_) {
        v.items.push_back(parse(depth + 1));
        if (peek() == ']') return ++at_, v;
        if (*at_ != ',') fail("',' is missing");
      }
    }
    if (c == '"') {
      v.kind = Json::string;
      v.text = text();
      return v;
    }
    v.number = number();
    return v;
  }

  int64_t number() {
    const bool negative = *at_ == '-';
    if (negative) ++at_;
    if (at_ == end_ || *at_ < '0' || *at_ > '9') fail("a value is missing");
    int64_t n = 0;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_)
      if (__builtin_mul_overflow(n, 10, &n) || __builtin_add_overflow(n, *at_ - '0', &n))
        fail("a number is too large");
    return negative ? -n : n;
  }

  std::string text() {
    std::string out;
    for (++at_;; ++at_) {
      if (at_ == end_) fail("a string does not end");
      if (*at_ == '"') return ++at_, out;
      if (static_cast<unsigned char>(*at_) < 32) fail("a control character");
      if (*at_ == '\\') {
        if (++at_ == end_ || (*at_ != '"' && *at_ != '\\' && *at_ != '/')) fail("an escape");
      }
      out += *at_;
    }
  }

  const char *at_, *begin_, *end_;
};

}  // namespace

const Json& Json::at(const std::string& name, Kind wanted) const {
  const auto found = fields.find(name);
  if (found == fields.end()) throw std::runtime_error("\"" + name + "\" is missing");
  if (found->second.kind != wanted) throw std::runtime_error("\"" + name + "\" has a wrong type");
  return found->second;
}

int64_t Json::integer_at(const std::string& name, int64_t low, int64_t high) const {
  const int64_t n = at(name, integer).number;
  if (n < low || n > high)
    throw std::runtime_error("\"" + name + "\" is " + std::to_string(n) + ", not " +
                             std::to_string(low) + " to " + std::to_string(high));
  return n;
}

Json parse_json(const char* begin, const char* end) { return Parser(begin, end).document(); }

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

}  // namespace knnfast
