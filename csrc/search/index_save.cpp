// SPDX-License-Identifier: Apache-2.0
// Saving writes new files, syncs them, and replaces the manifest by rename: a kill at any moment
// leaves the old index or the new one. Files that no manifest names are removed last. A save that
// fails takes its own files back.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <optional>
#include <random>
#include <stdexcept>
#include <system_error>

#include "common/file.h"
#include "common/json.h"
#include "search/index_files.h"
#include "search/index_impl.h"
#include "search/rotation.h"

namespace knnfast {
namespace {

struct Part {
  const void* data;
  size_t bytes;
};

FileEntry write_parts(const std::string& path, const std::string& name,
                      const std::vector<Part>& parts) {
  File f(path, O_WRONLY | O_CREAT | O_EXCL);
  FileEntry entry{name, 0, 0};
  constexpr size_t kStep = size_t{1} << 20;  // checksum what is about to be written, while cached
  for (const Part& p : parts)
    for (size_t at = 0; at < p.bytes; at += kStep) {
      const char* from = static_cast<const char*>(p.data) + at;
      const size_t n = std::min(kStep, p.bytes - at);
      entry.crc = crc32c(from, n, entry.crc);
      f.write(from, n);
      entry.bytes += n;
    }
  f.sync();
  return entry;
}

std::string json_of(const FileEntry& e) {
  return "{\"name\":" + quoted(e.name) + ",\"bytes\":" + std::to_string(e.bytes) +
         ",\"crc32c\":" + std::to_string(e.crc) + "}";
}

std::string new_generation() {
  std::random_device random;
  char text[17];
  std::snprintf(text, sizeof text, "%08x%08x", random(), random());
  return text;
}

bool generation_at(const std::string& name, size_t at) {
  return name.size() >= at + 16 &&
         name.find_first_not_of("0123456789abcdef", at) >= at + 16;  // npos, too
}

// manifest.json.GENERATION: a new manifest, before it is renamed.
bool temporary_name(const std::string& name) {
  const std::string begin = std::string(kManifest) + ".";
  return name.rfind(begin, 0) == 0 && name.size() == begin.size() + 16 &&
         generation_at(name, begin.size());
}

bool holds_index(const std::string& folder) {
  const std::string path = folder + "/" + kManifest;
  struct stat s;
  if (stat(path.c_str(), &s) || !S_ISREG(s.st_mode)) return false;
  FILE* f = fopen(path.c_str(), "rb");
  if (!f) fail("cannot open", path);
  char head[200];
  const size_t size = fread(head, 1, sizeof head, f);
  fclose(f);
  return std::string(head, size).find("\"format\":\"knnfast-index\"") != std::string::npos;
}

// Refuses a folder that holds other things and no index. What a first save has left that was
// killed, or is making in this moment, is not in the way.
void check_place(const std::string& folder) {
  std::vector<std::string> others;
  for (const std::string& name : names_in(folder))
    if (name[0] != '.' && !payload_name(name) && !temporary_name(name)) others.push_back(name);
  if (others.empty() || holds_index(folder)) return;
  throw std::invalid_argument("path: " + folder + " holds other files (" +
                              *std::min_element(others.begin(), others.end()) +
                              ") and no index; give a new folder");
}

void remove_others(const std::string& folder, const std::vector<FileEntry>& keep) {
  std::vector<std::string> names;
  try {
    names = names_in(folder);
  } catch (const std::system_error&) {
    return;  // they stay until the next save; this one is done
  }
  for (const std::string& name : names) {
    const bool ours = payload_name(name) || temporary_name(name);
    if (ours &&
        std::none_of(keep.begin(), keep.end(), [&](const FileEntry& f) { return f.name == name; }))
      unlink((folder + "/" + name).c_str());
  }
}

// The files of a save, taken back unless it is done; with the folder where the save has made it.
// The folder stays locked until then.
class Unfinished {
 public:
  Unfinished(const std::string& folder, bool made) : folder_(folder), made_(made) {}
  ~Unfinished() {
    if (done_) return;
    for (const std::string& path : paths_) unlink(path.c_str());
    if (made_) rmdir(folder_.c_str());
  }
  Unfinished(const Unfinished&) = delete;
  Unfinished& operator=(const Unfinished&) = delete;

  // The path of a file that is about to be made.
  const std::string& path(const std::string& name) {
    paths_.push_back(folder_ + "/" + name);
    return paths_.back();
  }
  // Writes a payload; its entry in the manifest.
  std::string put(const std::string& name, const std::vector<Part>& parts) {
    files.push_back(write_parts(path(name), name, parts));
    return json_of(files.back());
  }
  void lock() { lock_.emplace(folder_); }
  void done() { done_ = true; }

  std::vector<FileEntry> files;  // the payloads written so far

 private:
  std::optional<FolderLock> lock_;
  std::string folder_;
  std::vector<std::string> paths_;
  bool made_, done_ = false;
};

// Writes a segment's payloads; its entry in the manifest. `rotation`: that of the index's rotation,
// empty until it is written.
std::string write_segment(Unfinished& ours, const std::string& stem, const SegmentView& v,
                          int64_t dim, std::string& rotation) {
  const size_t n = v.n, d = static_cast<size_t>(dim), whole = n / kBlockRows * kBlockRows;
  std::string json =
      "{\"rows\":" + std::to_string(n) + ",\"first_id\":" + std::to_string(v.ids ? 0 : v.first_id);
  const auto field = [&](const char* key, const std::string& entry) {
    json += std::string(",\"") + key + "\":" + entry;
  };
  field("vectors", ours.put(stem + ".rows.f16", {{v.segment->rows.as<char>(), n * d * 2}}));
  std::vector<Part> terms = {{v.segment->row_norm.as<char>(), n * 4}};
  if (v.codes) {
    const std::vector<char> zeros(kCodesSlack);
    const size_t bytes = whole * static_cast<size_t>(code_groups(dim)) * kBlockDims;
    field("codes", ours.put(stem + ".codes.u8",
                            {{v.codes->codes.as<char>(), bytes}, {zeros.data(), zeros.size()}}));
    terms.push_back({v.codes->mean.data(), d * 4});
    terms.push_back({v.codes->scale.as<char>(), whole * 4});
    terms.push_back({v.codes->bounds.as<char>(), whole * 4});
    terms.push_back({v.codes->norm.as<char>(), whole * 4});
  }
  if (v.codes && v.codes->rotation) {
    if (rotation.empty()) {
      std::vector<float> matrix(d * d + 1);
      v.codes->rotation->rows(matrix.data());
      matrix.back() = static_cast<float>(v.codes->rotation->error);
      rotation = ours.put(stem + ".rotation.f32", {{matrix.data(), matrix.size() * 4}});
    }
    field("rotation", rotation);
  }
  field("terms", ours.put(stem + ".terms.f32", terms));
  if (v.ids) field("ids", ours.put(stem + ".ids.i64", {{v.ids->as<char>(), n * 8}}));
  if (v.live)
    field("live", ours.put(stem + ".live.u16", {{v.live->data(), (n / kBlockRows + 1) * 2}}));
  return json + "}";
}

}  // namespace

bool payload_name(const std::string& name) {
  const char* const kKinds[] = {".rows.f16",  ".ids.i64",  ".live.u16",
                                ".terms.f32", ".codes.u8", ".rotation.f32"};
  if (name.size() < 17 || !generation_at(name, 0) || name[16] != '-') return false;
  const size_t end = name.find_first_not_of("0123456789", 17);
  return end != std::string::npos && end >= 17 + 4 &&
         std::any_of(std::begin(kKinds), std::end(kKinds), [&](const char* kind) {
           return name.compare(end, std::string::npos, kind) == 0;
         });
}

void Index::save(const std::string& folder) const {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> one(m.writer);
  std::shared_ptr<const Snapshot> snapshot = m.snapshot();
  struct stat s;
  const bool made = mkdir(folder.c_str(), 0755) == 0;
  if (!made && errno != EEXIST) fail("cannot make", folder);
  Unfinished ours(folder, made);
  if (stat(folder.c_str(), &s)) fail("cannot stat", folder);
  if (!S_ISDIR(s.st_mode)) throw std::invalid_argument("path: " + folder + " is not a folder");
  ours.lock();
  check_place(folder);

  const std::string whole = real_path(folder);
  const std::string generation = new_generation();
  std::string segments, rotation;
  for (size_t i = 0; i < snapshot->size(); ++i) {
    char stem[40];
    std::snprintf(stem, sizeof stem, "%s-%04zu", generation.c_str(), i);
    if (i) segments += ",\n";
    segments += write_segment(ours, stem, (*snapshot)[i], m.dim, rotation);
  }
  const std::string index =
      "{\"format\":\"knnfast-index\",\"version\":" + std::to_string(kFormatVersion) +
      ",\"dim\":" + std::to_string(m.dim) + ",\"metric\":" + quoted(kMetricNames[int(m.metric)]) +
      ",\"scan\":" + quoted(kScanNames[int(m.scan)]) + ",\"next_id\":" + std::to_string(m.next_id) +
      ",\"segments\":[\n" + segments + "]}";
  const std::string manifest = "{\"crc32c\":" + std::to_string(crc32c(index.data(), index.size())) +
                               ",\"index\":" + index + "}\n";
  const std::string temporary = ours.path(std::string(kManifest) + "." + generation);
  {
    File f(temporary, O_WRONLY | O_CREAT | O_EXCL);
    f.write(manifest.data(), manifest.size());
    f.sync();
  }
  sync_folder(folder);
  const std::string path = folder + "/" + kManifest;
  if (rename(temporary.c_str(), path.c_str())) fail("cannot rename to", path);
  ours.done();  // the manifest names them
  sync_folder(folder);
  remove_others(folder, ours.files);
  std::unique_lock<std::shared_mutex> lock(m.state);
  m.folder = whole;
  m.files = std::move(ours.files);
}

}  // namespace knnfast
