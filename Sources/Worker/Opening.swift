// What the daemon does for a supervised worker and a worker by hand does for itself: finding
// and opening the store and its base, and locking both.

import Glibc
import ImageFormats
import Posix

/// Stores opened by their paths.
enum Opening {
  /// Opens an image by the paths of its store and, unless the image shall say it itself,
  /// its base.
  static func image(
    _ name: FormatName, store path: String, base given: String?, _ request: ImageRequest
  ) throws(WorkerError) -> OpenImage {
    let store = try open(path, as: "store", writable: !request.readOnly, name, request)
    var base = given
    if base == nil {
      let named = try imaging { () throws(ImageError) in try name.basePath(of: store) }
      base = named.map { beside(path, $0) }
    }
    var baseStore: FileStore?
    if let base { baseStore = try open(base, as: "base", writable: false, name, request) }
    return try OpenImage(name, store: store, base: baseStore, request)
  }

  /// A base's path as an image means it: what is relative starts at the store's folder.
  static func beside(_ store: String, _ base: String) -> String {
    guard !base.hasPrefix("/"), let slash = store.lastIndex(of: "/") else { return base }
    return store[...slash] + base
  }

  private static func open(
    _ path: String, as role: String, writable: Bool, _ name: FormatName,
    _ request: ImageRequest
  ) throws(WorkerError) -> FileStore {
    let store: FileStore
    do throws(IOError) {
      store = try FileStore(path: path, writable: writable)
    } catch {
      guard error.code == ENOENT else { throw WorkerError(error) }
      let remedy =
        role == "store"
        ? "make it with '\(name.rawValue)_tool -c \(path) BASE'"
        : "put it back, or say with --base where it is"
      throw WorkerError("io", "\(role) \(path) does not exist: \(remedy)")
    }
    guard !request.isLocked else { return store }
    do throws(IOError) {
      try store.lock(exclusive: writable)
    } catch {
      guard error.code == EAGAIN else { throw WorkerError(error) }
      throw WorkerError(
        "in-use",
        "\(role) \(path) is in use by another program: end that one first, or choose another")
    }
    return store
  }
}
