// SPDX-License-Identifier: Apache-2.0
// A saved index: a folder with manifest.json and, per segment, raw little-endian arrays:
//
//   GENERATION-NNNN.rows.f16     [n, dim] FP16, row-major: what numpy.fromfile reads
//   GENERATION-NNNN.ids.i64      [n], only with own ids
//   GENERATION-NNNN.live.u16     a bit a row, only after removals
//   GENERATION-NNNN.terms.f32    row norms [n]; with codes also mean [dim], scale, bounds, norm
//   GENERATION-NNNN.codes.u8     the blocks of segment.h, 1 KiB of zeros behind them
//   GENERATION-NNNN.rotation.f32 [dim, dim] and its error (rotation.h), where codes have one; one
//                                for all segments that name it
//
// manifest.json is {"crc32c": N, "index": {...}}, the checksum covering the text of "index".
// Saving writes new files, syncs them, and replaces the manifest by rename: a kill at any moment
// leaves the old index or the new one. Files that no manifest names are removed last. A save that
// fails takes its own files back.
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <random>
#include <system_error>

#include "index_impl.h"
#include "json.h"
#include "rotation.h"
#include "thread_pool.h"

namespace knnfast {
namespace {

constexpr const char* kManifest = "manifest.json";
// 1: residuals as floats in the place of bounds; 2: stops after 3/8 and 5/8 of the groups; 3: no
// rotations.
constexpr int64_t kVersion = 4;

struct CrcTables {
  uint32_t t[8][256];
  constexpr CrcTables() : t() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
      t[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; ++i)
      for (int k = 1; k < 8; ++k) t[k][i] = t[k - 1][i] >> 8 ^ t[0][t[k - 1][i] & 255];
  }
};
constexpr CrcTables kCrc;

uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0) {
  const unsigned char* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; bytes >= 8; bytes -= 8, p += 8) {
    const uint32_t low = crc ^ (p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24);
    crc = kCrc.t[7][low & 255] ^ kCrc.t[6][low >> 8 & 255] ^ kCrc.t[5][low >> 16 & 255] ^
          kCrc.t[4][low >> 24] ^ kCrc.t[3][p[4]] ^ kCrc.t[2][p[5]] ^ kCrc.t[1][p[6]] ^
          kCrc.t[0][p[7]];
  }
  for (; bytes; --bytes, ++p) crc = crc >> 8 ^ kCrc.t[0][(crc ^ *p) & 255];
  return ~crc;
}

[[noreturn]] void fail(const std::string& what, const std::string& path) {
  throw std::system_error(errno, std::generic_category(), what + " " + path);
}
[[noreturn]] void damaged(const std::string& path, const std::string& why) {
  throw DamagedFile(path + ": " + why);
}

class File {
 public:
  File(const std::string& path, int flags)
      : path_(path),
        fd_(::open(path.c_str(), flags | O_CLOEXEC | O_NONBLOCK, 0644)) {  // a FIFO does not hang
    if (fd_ < 0) fail("cannot open", path);
  }
  ~File() { ::close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd() const { return fd_; }
  uint64_t size() const {
    struct stat s;
    if (fstat(fd_, &s)) fail("cannot stat", path_);
    if (!S_ISREG(s.st_mode)) damaged(path_, "not a regular file");
    return static_cast<uint64_t>(s.st_size);
  }
  void write(const void* data, size_t bytes) {
    const char* p = static_cast<const char*>(data);
    while (bytes) {
      const ssize_t n = ::write(fd_, p, std::min<size_t>(bytes, size_t{1} << 30));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) fail("cannot write", path_);
      p += n;
      bytes -= static_cast<size_t>(n);
    }
  }
  void read(void* data, size_t bytes) {
    char* p = static_cast<char*>(data);
    while (bytes) {
      const ssize_t n = ::read(fd_, p, std::min<size_t>(bytes, size_t{1} << 30));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail("cannot read", path_);
      if (n == 0) damaged(path_, "it is shorter than the manifest says");
      p += n;
      bytes -= static_cast<size_t>(n);
    }
  }
  void sync() {
    if (fsync(fd_)) fail("cannot sync", path_);
  }

 private:
  std::string path_;
  int fd_;
};

void sync_folder(const std::string& folder) { File(folder, O_RDONLY | O_DIRECTORY).sync(); }

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

const char* const kMetrics[] = {"ip", "cosine", "l2"};
const char* const kScans[] = {"fp16", "int8", "auto"};

int index_of(const std::string& name, const char* const (&names)[3], const char* what) {
  for (int i = 0; i < 3; ++i)
    if (name == names[i]) return i;
  throw std::runtime_error(std::string("\"") + what + "\" is " + quoted(name));
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

// Ours: the names of payloads as above, and a generation behind a new manifest's.
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
bool temporary_name(const std::string& name) {
  const std::string begin = std::string(kManifest) + ".";
  return name.rfind(begin, 0) == 0 && name.size() == begin.size() + 16 &&
         generation_at(name, begin.size());
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  DIR* dir = opendir(folder.c_str());
  if (!dir) fail("cannot list", folder);
  while (const dirent* e = readdir(dir)) names.push_back(e->d_name);
  closedir(dir);
  return names;
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

// Holds a folder for one writer: others, in any thread or process, wait. A file system without
// locks holds nobody off.
class FolderLock {
 public:
  explicit FolderLock(const std::string& folder) : folder_(folder, O_RDONLY | O_DIRECTORY) {
    while (flock(folder_.fd(), LOCK_EX) && errno == EINTR) {
    }
  }
  ~FolderLock() { flock(folder_.fd(), LOCK_UN); }  // a forked child may hold the file, too
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  File folder_;
};

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
  void lock() { lock_.emplace(folder_); }
  void done() { done_ = true; }

 private:
  std::optional<FolderLock> lock_;
  std::string folder_;
  std::vector<std::string> paths_;
  bool made_, done_ = false;
};

FileEntry entry_of(const Json& segment, const std::string& key, uint64_t bytes) {
  const Json& e = segment.at(key, Json::object);
  FileEntry f;
  f.name = e.at("name", Json::string).text;
  f.bytes = static_cast<uint64_t>(e.integer_at("bytes", 0, INT64_MAX));
  f.crc = static_cast<uint32_t>(e.integer_at("crc32c", 0, UINT32_MAX));
  if (!payload_name(f.name)) throw std::runtime_error("a bad file name: " + quoted(f.name));
  if (f.bytes != bytes)
    throw std::runtime_error(quoted(f.name) + " should have " + std::to_string(bytes) +
                             " bytes, not " + std::to_string(f.bytes));
  return f;
}

Json read_manifest(const std::string& path) {
  File f(path, O_RDONLY);
  const uint64_t size = f.size();
  if (size > (uint64_t{64} << 20)) damaged(path, "it is larger than any manifest");
  std::string text(size, '\0');
  f.read(&text[0], size);
  const std::string open = "{\"crc32c\":", middle = ",\"index\":";
  const size_t at = text.find(middle);
  if (text.rfind(open, 0) != 0 || at == std::string::npos || text.size() < 2 ||
      text.substr(text.size() - 2) != "}\n")
    damaged(path, "not a knnfast index");
  const char* begin = text.data() + at + middle.size();
  const char* end = text.data() + text.size() - 2;
  const std::string sum = text.substr(open.size(), at - open.size());
  if (begin > end || sum != std::to_string(crc32c(begin, static_cast<size_t>(end - begin))))
    damaged(path, "its checksum is wrong");
  try {
    return parse_json(begin, end);
  } catch (const std::runtime_error& e) {
    damaged(path, e.what());
  }
}

// A payload: mapped, or read and checked.
std::shared_ptr<Buffer> load(const std::string& folder, const FileEntry& entry, bool map,
                             size_t slack = 0) {
  const std::string path = folder + "/" + entry.name;
  File f(path, O_RDONLY);
  if (f.size() != entry.bytes)
    damaged(path, "it has " + std::to_string(f.size()) + " bytes, the manifest says " +
                      std::to_string(entry.bytes));
  if (map) return std::make_shared<Buffer>(Buffer::map_file(f.fd(), entry.bytes));
  auto b = std::make_shared<Buffer>(Buffer::reserve(entry.bytes + slack));
  f.read(b->as<char>(), entry.bytes);
  if (crc32c(b->as<char>(), entry.bytes) != entry.crc) damaged(path, "its checksum is wrong");
  return b;
}

Buffer copy_floats(const float* from, size_t n) {
  Buffer b = Buffer::reserve(n * 4);
  std::memcpy(b.as<float>(), from, n * 4);
  return b;
}

// The one rotation of an index.
struct LoadedRotation {
  FileEntry entry;
  std::shared_ptr<const Rotation> rotation;

  std::shared_ptr<const Rotation> get(const std::string& folder, const FileEntry& wanted,
                                      int64_t dim) {
    if (rotation) {
      if (wanted.name != entry.name || wanted.crc != entry.crc)
        throw std::runtime_error("segments with different rotations");
      return rotation;
    }
    entry = wanted;
    const std::shared_ptr<Buffer> file = load(folder, entry, false);
    const float* rows = file->as<float>();
    rotation = Rotation::from_rows(rows, dim, rows + dim * dim);
    if (!rotation->orthogonal()) damaged(folder + "/" + entry.name, "it is no rotation");
    return rotation;
  }
};

SegmentView load_segment(const std::string& folder, const Json& j, int64_t version, int64_t dim,
                         bool map, std::vector<FileEntry>& files, LoadedRotation& rotation) {
  SegmentView v;
  const uint64_t n = static_cast<uint64_t>(j.integer_at("rows", 1, int64_t{1} << 31));
  const uint64_t d = static_cast<uint64_t>(dim);
  v.n = static_cast<uint32_t>(n);
  v.sealed = true;
  v.first_id = j.integer_at("first_id", 0, INT64_MAX - static_cast<int64_t>(n));
  v.segment = std::make_shared<Segment>();
  v.segment->capacity = static_cast<int64_t>(n);
  const bool coded = j.fields.count("codes") > 0;
  const uint64_t whole = n / kBlockRows * kBlockRows;
  // Rows are read up to 64 bytes at a time, but never past the last one.
  const FileEntry rows = entry_of(j, "vectors", n * d * 2);
  const FileEntry terms = entry_of(j, "terms", (n + (coded ? d + 3 * whole : 0)) * 4);
  files.push_back(rows);
  files.push_back(terms);
  v.segment->rows = std::move(*load(folder, rows, map));
  const std::shared_ptr<Buffer> floats = load(folder, terms, map);
  const float* f = floats->as<float>();
  v.segment->row_norm = copy_floats(f, n);
  if (coded) {
    const FileEntry codes = entry_of(
        j, "codes", whole * static_cast<uint64_t>(code_groups(dim)) * kBlockDims + kCodesSlack);
    files.push_back(codes);
    v.codes = std::make_shared<Codes>();
    v.codes->mean.assign(f + n, f + n + d);
    double square = 0;
    for (float m : v.codes->mean) square += static_cast<double>(m) * m;
    v.codes->mean_norm = std::sqrt(square);
    v.codes->mean_rows = static_cast<int64_t>(n);
    v.codes->scale = copy_floats(f + n + d, whole);
    v.codes->bounds = copy_floats(f + n + d + whole, whole);
    v.codes->norm = copy_floats(f + n + d + 2 * whole, whole);
    if (version < 3)  // nothing is known of the norms behind the stops
      for (uint64_t i = 0; i < whole; ++i) {
        uint32_t& bounds = v.codes->bounds.as<uint32_t>()[i];
        bounds = (version == 1 ? residual_up(bounds) : bounds) | 0xffff;
      }
    v.codes->codes = std::move(*load(folder, codes, map));
    if (j.fields.count("rotation")) {
      if (version < 4 || dim > kMaxRotated) throw std::runtime_error("a rotation out of place");
      const FileEntry entry = entry_of(j, "rotation", (d * d + 1) * 4);
      if (!rotation.rotation) files.push_back(entry);
      v.codes->rotation = rotation.get(folder, entry, dim);
      v.codes->rotate_mean();
    }
  }
  if (j.fields.count("ids")) {
    const FileEntry ids = entry_of(j, "ids", n * 8);
    files.push_back(ids);
    v.ids = load(folder, ids, map);
  }
  if (j.fields.count("live")) {
    const FileEntry live = entry_of(j, "live", (n / kBlockRows + 1) * 2);
    files.push_back(live);
    const std::shared_ptr<Buffer> bits = load(folder, live, map);
    const uint16_t* w = bits->as<uint16_t>();
    v.live = std::make_shared<LiveMask>(w, w + n / kBlockRows + 1);
  }
  return v;
}

}  // namespace

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

  const std::string generation = new_generation();
  std::vector<FileEntry> files;
  std::string segments;
  const std::vector<char> zeros(kCodesSlack);
  auto put = [&](const std::string& name, const std::vector<Part>& parts) {
    files.push_back(write_parts(ours.path(name), name, parts));
    return json_of(files.back());
  };
  size_t number = 0;
  std::string rotation;  // as JSON, when it is written
  for (const SegmentView& v : *snapshot) {
    char stem[40];
    std::snprintf(stem, sizeof stem, "%s-%04zu", generation.c_str(), number++);
    const std::string at = stem;
    const size_t n = v.n, d = static_cast<size_t>(m.dim), whole = n / kBlockRows * kBlockRows;
    if (!segments.empty()) segments += ",\n";
    segments += "{\"rows\":" + std::to_string(n) + ",\"first_id\":" + std::to_string(v.first_id);
    auto field = [&](const char* key) { segments += std::string(",\"") + key + "\":"; };
    std::string json = put(at + ".rows.f16", {{v.segment->rows.as<char>(), n * d * 2}});
    field("vectors");
    segments += json;
    std::vector<Part> terms = {{v.segment->row_norm.as<char>(), n * 4}};
    if (v.codes) {
      terms.push_back({v.codes->mean.data(), d * 4});
      terms.push_back({v.codes->scale.as<char>(), whole * 4});
      terms.push_back({v.codes->bounds.as<char>(), whole * 4});
      terms.push_back({v.codes->norm.as<char>(), whole * 4});
      json = put(at + ".codes.u8",
                 {{v.codes->codes.as<char>(), whole * static_cast<size_t>(code_groups(m.dim)) * 4},
                  {zeros.data(), zeros.size()}});
      field("codes");
      segments += json;
    }
    if (v.codes && v.codes->rotation) {
      if (rotation.empty()) {
        std::vector<float> matrix(d * d + 1);
        v.codes->rotation->rows(matrix.data());
        matrix.back() = static_cast<float>(v.codes->rotation->error);
        rotation = put(at + ".rotation.f32", {{matrix.data(), matrix.size() * 4}});
      }
      field("rotation");
      segments += rotation;
    }
    json = put(at + ".terms.f32", terms);
    field("terms");
    segments += json;
    if (v.ids) {
      json = put(at + ".ids.i64", {{v.ids->as<char>(), n * 8}});
      field("ids");
      segments += json;
    }
    if (v.live) {
      json = put(at + ".live.u16", {{v.live->data(), (n / kBlockRows + 1) * 2}});
      field("live");
      segments += json;
    }
    segments += "}";
  }
  const std::string index =
      "{\"format\":\"knnfast-index\",\"version\":" + std::to_string(kVersion) +
      ",\"dim\":" + std::to_string(m.dim) + ",\"metric\":" + quoted(kMetrics[int(m.metric)]) +
      ",\"scan\":" + quoted(kScans[int(m.scan)]) + ",\"next_id\":" + std::to_string(m.next_id) +
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
  remove_others(folder, files);
  std::unique_lock<std::shared_mutex> lock(m.state);
  m.folder = folder;
  m.files = std::move(files);
}

Index Index::open(const std::string& folder, bool map) {
  const std::string path = folder + "/" + kManifest;
  const auto once = [&] {
    const Json j = read_manifest(path);
    std::unique_ptr<Impl> impl(new Impl);
    try {
      if (j.kind != Json::object || j.at("format", Json::string).text != "knnfast-index")
        throw std::runtime_error("not a knnfast index");
      const int64_t version = j.integer_at("version", 1, INT64_MAX);
      if (version > kVersion)
        throw std::runtime_error("written by a newer knnfast: format " + std::to_string(version) +
                                 ", this one reads 1 to " + std::to_string(kVersion));
      impl->dim = j.integer_at("dim", 1, 65536);
      impl->metric = Metric(index_of(j.at("metric", Json::string).text, kMetrics, "metric"));
      impl->scan = Scan(index_of(j.at("scan", Json::string).text, kScans, "scan"));
      impl->next_id = j.integer_at("next_id", 0, INT64_MAX);
      auto snapshot = std::make_shared<Snapshot>();
      LoadedRotation rotation;
      for (const Json& segment : j.at("segments", Json::array).items)
        snapshot->push_back(
            load_segment(folder, segment, version, impl->dim, map, impl->files, rotation));
      for (const SegmentView& v : *snapshot)
        for (uint32_t r = 0; r < v.n; ++r) {
          const int64_t id = v.id(r);
          if (id < 0 || id >= impl->next_id) throw std::runtime_error("an id is out of range");
          impl->ascending = impl->ascending && id > impl->last_id;
          impl->last_id = std::max(impl->last_id, id);
          impl->live += v.alive(r);
        }
      if (!impl->ascending)
        for (size_t s = 0; s < snapshot->size(); ++s)
          for (uint32_t r = 0; r < (*snapshot)[s].n; ++r)
            if ((*snapshot)[s].alive(r) &&
                !impl->map.insert((*snapshot)[s].id(r), uint64_t{s} << 32 | r))
              throw std::runtime_error("an id comes twice");
      impl->current = snapshot;
    } catch (const DamagedFile&) {
      throw;
    } catch (const std::system_error&) {
      throw;
    } catch (const std::runtime_error& e) {
      damaged(path, e.what());
    }
    impl->folder = folder;
    return Index(std::move(impl));
  };
  for (;;) {
    struct stat before, after;
    const bool there = stat(path.c_str(), &before) == 0;
    try {
      return once();
    } catch (const std::system_error& e) {
      // Another process has saved meanwhile, and removed what the manifest named?
      const bool again =
          there && e.code().value() == ENOENT && stat(path.c_str(), &after) == 0 &&
          (before.st_ino != after.st_ino || before.st_mtim.tv_nsec != after.st_mtim.tv_nsec);
      if (!again) throw;
    }
  }
}

std::vector<std::string> Index::verify() const {
  std::string folder;
  std::vector<FileEntry> files;
  {
    std::shared_lock<std::shared_mutex> lock(impl_->state);
    folder = impl_->folder;
    files = impl_->files;
  }
  std::vector<char> bad(files.size());
  parallel_for(static_cast<int64_t>(files.size()), [&](int, int64_t i) {
    const FileEntry& e = files[static_cast<size_t>(i)];
    try {
      File f(folder + "/" + e.name, O_RDONLY);
      uint32_t crc = 0;
      std::vector<char> part(size_t{1} << 20);
      uint64_t left = f.size();
      bool ok = left == e.bytes;
      while (ok && left) {
        const size_t n = static_cast<size_t>(std::min<uint64_t>(left, part.size()));
        f.read(part.data(), n);
        crc = crc32c(part.data(), n, crc);
        left -= n;
      }
      bad[static_cast<size_t>(i)] = !ok || crc != e.crc;
    } catch (const std::exception&) {
      bad[static_cast<size_t>(i)] = 1;
    }
  });
  std::vector<std::string> out;
  for (size_t i = 0; i < files.size(); ++i)
    if (bad[i]) out.push_back(folder + "/" + files[i].name);
  return out;
}

}  // namespace knnfast
